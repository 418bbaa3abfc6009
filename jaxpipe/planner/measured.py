"""Seconds of layers that were not counted but measured: on a device that is here, or in cycles of the TPU compiler.

Each distinct layer is measured once for each mode, for the rows of the example, as a step runs it: forward with what it
keeps, and backward from that.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import ConfigError
from jaxpipe.hardware import hlo
from jaxpipe.hardware.chips import Chip
from jaxpipe.hardware.structure import blocks
from jaxpipe.hardware.topology import topology
from jaxpipe.mesh import make_mesh, manual_axes
from jaxpipe.model.shapes import is_inexact, is_key
from jaxpipe.planner.trace import Model, Traced

_REPEATS = 5


class Measured(NamedTuple):
    """Seconds of one run for the rows of the example, on one device that has the whole layer."""

    forward: float
    backward: float


class Source(Protocol):
    """Where seconds come from."""

    name: str

    def measure(self, traced: Traced) -> Measured:
        """The seconds of a layer, or of the loss."""
        ...


class Timed:
    """Runs layers on the first device of this process, with numbers that are made up."""

    def __init__(self, model: Model):
        self.mesh = model.mesh
        self.name = f"layers timed on {model.mesh.devices.flat[0].device_kind}"
        self._call: float | None = None

    def measure(self, traced: Traced) -> Measured:
        return Measured(self._time(traced.forward), self._time(traced.backward))

    def _time(self, jaxpr: jex.ClosedJaxpr) -> float:
        """Without what a call costs that computes nothing: inside of a step there is no call."""
        if not jaxpr.jaxpr.eqns:
            return 0.0
        if self._call is None:
            self._call = self._once(jax.make_jaxpr(lambda x: -x)(jnp.zeros(())))
        return max(self._once(jaxpr) - self._call, 0.0)

    def _once(self, jaxpr: jex.ClosedJaxpr) -> float:
        run = _runnable(jaxpr, self.mesh)
        arguments = [_some(var.aval, number) for number, var in enumerate(jaxpr.jaxpr.invars)]
        jax.block_until_ready(run(*arguments))  # compiles
        found: list[float] = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            found.append(time.perf_counter() - start)
        return statistics.median(found)


class Cycles:
    """Compiles layers for one TPU chip that need not be here, and adds up the cycles that the compiler estimates.

    Args:
      model: traced on the mesh of `mesh_of`.
    """

    def __init__(self, model: Model, chip: Chip):
        assert chip.clock is not None, "mesh_of refuses others"
        self.clock, self.mesh = chip.clock, model.mesh
        self.name = f"the cycles that the TPU compiler estimates for {chip.name}"

    def measure(self, traced: Traced) -> Measured:
        return Measured(self._seconds(traced.forward), self._seconds(traced.backward))

    def _seconds(self, jaxpr: jex.ClosedJaxpr) -> float:
        if not jaxpr.jaxpr.eqns:
            return 0.0
        place = NamedSharding(self.mesh, PartitionSpec())
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=place) for v in jaxpr.jaxpr.invars]  # type: ignore[attr-defined]
        text = _runnable(jaxpr, self.mesh).lower(*avals).compile().as_text()
        assert text is not None, "a compiled layer has a text"
        found = sum(one.cycles * block.times for block in blocks(hlo.parse(text)) for one in block.computation)
        return found / self.clock


def mesh_of(measure: str | None, chip: Chip, axes: Mapping[str, int]) -> Mesh:
    """The mesh of one device on which layers are traced: that of the TPU compiler if it is asked, else one that is here.

    Args:
      axes: sizes of further axes.

    Raises:
      ConfigError: measure="tpu", and the chip is no TPU. HardwareError: the TPU compiler is not installed.
    """
    if measure != "tpu":
        return make_mesh(1, 1, devices=jax.devices()[:1], **axes)  # type: ignore[arg-type]
    if chip.clock is None:
        raise ConfigError(
            f'measure="tpu" asks the TPU compiler, and {chip.name} is none of the TPU chips that it knows. Leave measure '
            'out, or use measure="time" on such a device.'
        )
    [device] = topology(f"{chip.name}:{'1x1x1' if chip.name in ('v4', 'v5p') else '1x1'}")
    return make_mesh(1, 1, devices=[device], **axes)  # type: ignore[arg-type]


def source(measure: str, model: Model, chip: Chip) -> Source:
    """What `plan(measure=...)` names, for a model that was traced on the mesh of `mesh_of`."""
    return Timed(model) if measure == "time" else Cycles(model, chip)


def _runnable(jaxpr: jex.ClosedJaxpr, mesh: Mesh) -> Any:
    """The function, jitted; mesh axes are bound in it as they were where it was traced."""
    inside = jax.shard_map(
        jex.jaxpr_as_fun(jaxpr),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names=manual_axes(mesh),
        check_vma=False,
    )
    return jax.jit(inside)


def _some(aval: Any, number: int) -> jax.Array:
    """An array of a shape: small floats, so that nothing overflows, and zeros of other kinds."""
    if is_key(aval):
        return jnp.broadcast_to(jax.random.key(number), aval.shape)
    if not is_inexact(aval):
        return jnp.zeros(aval.shape, aval.dtype)
    return (0.02 * jax.random.normal(jax.random.key(number), aval.shape, jnp.float32)).astype(aval.dtype)
