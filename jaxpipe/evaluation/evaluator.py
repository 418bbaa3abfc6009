"""Runs evaluation programs and brings their results into the form that the user gets."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe import schedules
from jaxpipe.errors import ConfigError
from jaxpipe.evaluation import ragged
from jaxpipe.executor import evaluate as _evaluate
from jaxpipe.executor.evaluate import Options
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import Program
from jaxpipe.mesh import data_size, pipe_size, rank_mesh
from jaxpipe.model.layout import Layout
from jaxpipe.model.shapes import avals
from jaxpipe.types import Batch, Params, Tree

P = PartitionSpec
Found = dict[str, Any]


class Evaluator:
    """Evaluates batches of any shape; each new shape or set of options compiles once.

    Args:
      layout: where the weights live, asked for when it is needed.
      mesh: the devices.
    """

    def __init__(self, layout: Callable[[], Layout], mesh: Mesh):
        self._layout, self.mesh = layout, mesh
        self._jitted = jax.jit(self._traceable, static_argnames="options")

    def _traceable(self, params: Params, inputs: Tree, labels: Tree, real: Any, options: Options) -> Found:
        program = _forward_program(pipe_size(self.mesh), jax.tree.leaves(inputs)[0].shape[0])
        return _evaluate.evaluate(self._layout(), self.mesh, program, params, inputs, labels, real, options)

    def lower(self, params: Params, batch: Batch, options: Options) -> jax.stages.Lowered:
        """The program, lowered."""
        return self._jitted.lower(params, avals(batch[0]), avals(batch[1]), None, options=options)

    def run(self, params: Params, groups: Sequence[Batch], options: Options) -> Found:
        """Evaluates micro-batches that need not have the same number of rows.

        Args:
          groups: batches with leaves [M, B, ...], each of one shape; B differs between them, and need not be a multiple of
            the data ranks. One program run per group, and one more for the rows that are left over when a group is split
            over the data ranks.

        Returns:
          "loss" and "metrics", "outputs" with leaves [M, B, ...] (the largest B; rows that are not there are zeros), and
          "rows" {name: [all rows, ...]}. With `options.raw` loss and metrics are sums, to be joined with others.
        """
        pieces = ragged.cut(groups, data_size(self.mesh))
        if len(pieces) == 1 and pieces[0].real is None:
            found = self._once(params, pieces[0], options)
            found["rows"] = {name: ragged.flat(a) for name, a in found["rows"].items()}
            return found
        return ragged.join(pieces, [self._once(params, piece, ragged.raw(options)) for piece in pieces], options)

    def _once(self, params: Params, piece: ragged.Piece, options: Options) -> Found:
        found = self._jitted(params, piece.inputs, piece.labels, piece.real, options=options)
        if not options.broadcast:
            sums = found["loss"], found["metrics"]
            found["loss"], found["metrics"] = jax.tree.map(lambda a: a[0], self._last_rank(sums, 1))
        count = jax.tree.leaves(piece.inputs)[0].shape[0]
        found["outputs"], found["rows"] = self._last_rank((found["outputs"], found["rows"]), count)
        return found

    def _last_rank(self, tree: Tree, length: int) -> Tree:
        """The part of leaves [S * length, ...] that the last rank holds: taken where it lies, nothing moves."""
        mesh = rank_mesh(self.mesh, pipe_size(self.mesh) - 1)
        mine = set(mesh.devices.flat)

        def one(leaf: jax.Array) -> jax.Array:
            if isinstance(leaf, Tracer):
                return leaf[-length:]
            assert isinstance(leaf.sharding, NamedSharding)
            sharding = NamedSharding(mesh, P(None, *leaf.sharding.spec[1:]))
            parts = [shard.data for shard in leaf.addressable_shards if shard.device in mine]
            shape = (length, *leaf.shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=leaf.dtype)

        return jax.tree.map(one, tree)


def options_of(
    return_logits: bool,
    compute_loss: bool,
    reduce_output: str | None,
    bcast_loss: bool,
    return_metrics: bool = False,
    spread_loss: bool | None = None,
) -> Options:
    """The options of a program from the arguments of a call.

    Raises:
      ConfigError: an unknown reduction, or arguments that contradict each other.
    """
    flags = {"return_logits": return_logits, "compute_loss": compute_loss, "bcast_loss": bcast_loss}
    for name, value in {**flags, "return_metrics": return_metrics}.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}: it is True or False.")
    if reduce_output not in _evaluate.REDUCTIONS:
        raise ConfigError(f'reduce_output={reduce_output!r}: it is "avg", "sum" or None (one value per micro-batch).')
    if return_metrics and not compute_loss:
        raise ConfigError("return_metrics=True needs compute_loss=True: loss_fn returns the metrics beside the loss.")
    if not isinstance(spread_loss, bool | None):
        raise ConfigError(f"spread_loss={spread_loss!r}: it is True, False, or None to let jaxpipe decide.")
    if spread_loss and (return_logits or not compute_loss or not bcast_loss):
        raise ConfigError(
            "spread_loss=True shares the work of the last layers and the loss among all ranks: that needs bcast_loss=True "
            "and no outputs (return_logits=False, compute_loss=True)."
        )
    return Options(
        outputs=return_logits or not compute_loss,
        loss=compute_loss,
        metrics=return_metrics,
        reduce_output=reduce_output if compute_loss else None,
        broadcast=bcast_loss or not compute_loss,
        spread=spread_loss,
    )


def answer(found: Found, options: Options) -> Any:
    """What a call returns: `loss`, `(loss, outputs)` or `outputs`, and the metrics behind it if they were asked for."""
    parts = [found["loss"]] if options.loss else []
    parts += [found["outputs"]] if options.outputs else []
    parts += [{**found["metrics"], **found["rows"]}] if options.metrics else []
    return parts[0] if len(parts) == 1 else tuple(parts)


@functools.lru_cache(maxsize=128)
def _forward_program(num_stages: int, num_micro_batches: int) -> Program:
    return lower(schedules.forward_only(num_stages, num_micro_batches))


def with_places(tree: Tree, shardings: Tree) -> Tree:
    """Abstract values that say where the leaves are."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=s), tree, shardings)
