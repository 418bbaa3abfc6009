"""How much a step is: rows or tokens, and the time it takes at the peak of the chips."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.hardware.chips import Chip, as_chip, chip_of
from jaxpipe.pipeline import Pipeline


class Work(NamedTuple):
    """How much a step is.

    Attributes:
      items: tokens or rows in a step, over all data ranks.
      name: "tokens" or "rows".
      seconds_at_peak: what the forward and the backward of the step would take if every chip of the mesh did nothing but
        their FLOPs, at its peak; None where the chip is not known.
    """

    items: int
    name: str
    seconds_at_peak: float | None


def chip_for(given: str | Mapping[str, float] | None) -> Chip | None:
    """The chip that a user names; None if none is named."""
    return None if given is None else as_chip(given)


def work_of(pipe: Pipeline, chip: Chip | None) -> Work:
    """Looks at the shapes of a pipeline that has seen an example; nothing runs on a device.

    Args:
      chip: the one to compare with; None: that of the mesh, if it is known.
    """
    assert pipe.example is not None, "initialize checks an example"
    first = jax.tree.leaves(pipe.example[0])[0]
    tokens = first.ndim == 2 and jnp.issubdtype(first.dtype, jnp.integer)
    items = pipe.num_micro_batches * math.prod(first.shape[: 2 if tokens else 1])
    chip = chip_of(pipe.mesh.devices.flat[0].device_kind) if chip is None else chip
    seconds = None if chip is None else _flops(pipe) / (pipe.mesh.size * chip.peak_flops)
    return Work(items, "tokens" if tokens else "rows", seconds)


def _flops(pipe: Pipeline) -> int:
    """Of a step on all devices: forward and backward of every layer, where nothing is computed twice."""
    assert pipe.example is not None
    layout, costs = pipe.layout, pipe.module.costs
    shapes = pipe.module.shapes(pipe.example[0], layout.layer_params, mesh=pipe.mesh, precision=pipe.precision)
    return pipe.num_micro_batches * sum(costs.training(shapes, lambda function: function, layout.frozen.of))
