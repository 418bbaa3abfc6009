"""Runs evaluation programs and brings their results into the form that the user gets."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe import schedules
from jaxpipe.evaluation import ragged
from jaxpipe.executor.eval_plan import EvalPlan
from jaxpipe.executor.evaluate import evaluate
from jaxpipe.executor.options import Found, Options
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import Program
from jaxpipe.mesh import data_size, pipe_size, rank_mesh
from jaxpipe.model.layout import Layout
from jaxpipe.model.shapes import avals
from jaxpipe.types import Batch, Params, Tree

P = PartitionSpec


class Evaluator:
    """Evaluates batches of any shape; each new shape or set of options compiles once.

    Args:
      layout: where the weights live, asked for when it is needed.
      mesh: the devices.
    """

    def __init__(self, layout: Callable[[], Layout], mesh: Mesh):
        self._layout, self.mesh = layout, mesh
        self._jitted = jax.jit(self._traceable, static_argnames="options")

    def _traceable(self, params: Params, inputs: Tree, labels: Tree, real: jax.Array | None, options: Options) -> Found:
        program = _forward_program(pipe_size(self.mesh), jax.tree.leaves(inputs)[0].shape[0])
        plan = EvalPlan(self._layout(), self.mesh, program, (inputs, labels), options)
        return evaluate(plan, params, (inputs, labels), real)

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
          What was found for all of them, `outputs` with leaves [M, B, ...] (the largest B; rows that are not there are
          zeros) and `rows` {name: [all rows, ...]}. With `options.raw` loss and metrics are sums, to be joined with others.
        """
        pieces = ragged.cut(groups, data_size(self.mesh))
        if len(pieces) == 1 and pieces[0].real is None:
            found = self._once(params, pieces[0], options)
            return replace(found, rows={name: ragged.flat(a) for name, a in found.rows.items()})
        raw = replace(options, raw=True)
        return ragged.join(pieces, [self._once(params, piece, raw) for piece in pieces], options)

    def _once(self, params: Params, piece: ragged.Piece, options: Options) -> Found:
        found = self._jitted(params, piece.inputs, piece.labels, piece.real, options=options)
        loss, metrics = found.loss, found.metrics
        if not options.broadcast:
            loss, metrics = jax.tree.map(lambda a: a[0], self._last_rank((loss, metrics), 1))
        count = jax.tree.leaves(piece.inputs)[0].shape[0]
        outputs, rows = self._last_rank((found.outputs, found.rows), count)
        return Found(loss, metrics, outputs, rows)

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


@functools.lru_cache(maxsize=128)
def _forward_program(num_stages: int, num_micro_batches: int) -> Program:
    return lower(schedules.forward_only(num_stages, num_micro_batches))


def with_places(tree: Tree, shardings: Tree) -> Tree:
    """Abstract values that say where the leaves are."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=s), tree, shardings)
