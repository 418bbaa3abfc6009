"""Runs evaluation programs and brings their results into the form that the user gets."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.data.place import on_all
from jaxpipe.data.shapes_seen import ShapesSeen
from jaxpipe.evaluation import ragged
from jaxpipe.executor.eval_plan import EvalPlan, rows_everywhere
from jaxpipe.executor.evaluate import evaluate
from jaxpipe.executor.options import Found, Options
from jaxpipe.executor.permutes import Checked
from jaxpipe.layout.layout import Layout
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import Program
from jaxpipe.mesh import data_size, pipe_size, rank_mesh
from jaxpipe.model.shapes import avals
from jaxpipe.processes.group import Group, settled
from jaxpipe.schedules.placed_forward_only import placed_forward_only
from jaxpipe.types import Batch, Params, Tree

P = PartitionSpec


class Evaluator:
    """Evaluates batches of any shape; each new shape or set of options compiles once.

    Args:
      layout: where the weights live, asked for when it is needed.
      mesh: the devices.
      placement: the rank of each stage.

    Attributes:
      holds_outputs: whether this process has devices of the rank with the last stage. If not, outputs are arrays without
        shards here, and what is not broadcast is None.
    """

    def __init__(self, layout: Callable[[], Layout], mesh: Mesh, placement: Sequence[int] | None = None):
        self._layout, self.mesh = layout, mesh
        self._placement = tuple(range(pipe_size(mesh)) if placement is None else placement)
        self._last = rank_mesh(mesh, self._placement[-1])
        self.holds_outputs = jax.process_index() in {device.process_index for device in self._last.devices.flat}
        self._jitted = Checked(jax.jit(self._traceable, static_argnames="options"), mesh)
        self._shapes = ShapesSeen("evaluation")

    def plan(self, batch: Batch, options: Options) -> EvalPlan:
        """What an evaluation of such a batch will do, from shapes alone."""
        program = _forward_program(self._placement, jax.tree.leaves(batch[0])[0].shape[0])
        return EvalPlan(self._layout(), self.mesh, program, batch, options)

    def _traceable(
        self, params: Params, inputs: Tree, labels: Tree, real: jax.Array | None, states: Tree, options: Options
    ) -> Found:
        batch = inputs, labels
        return evaluate(self.plan(batch, options), params, batch, real, states)

    def trace(self, params: Params, batch: Batch, options: Options, states: Tree = None) -> jax.stages.Traced:
        """The program, traced."""
        return self._jitted.trace(params, avals(batch[0]), avals(batch[1]), None, states, options=options)

    def run(self, params: Params, groups: Sequence[Batch], options: Options, states: Tree = None) -> Found:
        """Evaluates micro-batches that need not have the same number of rows.

        Args:
          groups: batches with leaves [M, B, ...], each of one shape; B differs between them, and need not be a multiple of
            the data ranks. One program run per group, and one more for the rows that are left over when a group is split
            over the data ranks.
          states: the state of the layers, a tree that `layout/state_layout.py` describes; None: they have none.

        Returns:
          What was found for all of them, `outputs` with leaves [M, B, ...] (the largest B; rows that are not there are
          zeros) and `rows` {name: [all rows, ...]}. With `options.raw` loss and metrics are sums, to be joined with others.
        """
        pieces, several = ragged.cut(groups, data_size(self.mesh)), Group.of(self.mesh).several
        if len(pieces) == 1 and pieces[0].real is None:
            found = self._once(params, pieces[0], options, states)
            rows = {name: ragged.flat(a) for name, a in found.rows.items()}
            return replace(found, rows=settled(rows) if several else rows)
        raw = replace(options, raw=True)
        each = [self._once(params, piece, raw, states) for piece in pieces]
        if not several:
            return ragged.join(pieces, each, options)
        return ragged.join_on(self._last, self.holds_outputs, pieces, each, options)

    def _once(self, params: Params, piece: ragged.Piece, options: Options, states: Tree) -> Found:
        inputs, labels = on_all((piece.inputs, piece.labels), self.mesh)
        self._shapes.add((inputs, labels))
        found = self._jitted(params, inputs, labels, piece.real, states, options=options)
        loss, metrics, rows = found.loss, found.metrics, found.rows
        count = jax.tree.leaves(piece.inputs)[0].shape[0]
        # Inside of a caller's jit every process traces the same.
        holds = self.holds_outputs or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(found))
        if not options.broadcast:
            last = self._last_rank((loss, metrics), 1) if holds else (None, None)
            loss, metrics = jax.tree.map(lambda a: a[0], last)
        if not rows_everywhere(self.mesh, options):
            rows = self._last_rank(rows, count) if holds else {}
        return Found(loss, metrics, self._last_rank(found.outputs, count), rows)

    def _last_rank(self, tree: Tree, length: int) -> Tree:
        """The part of leaves [S * length, ...] that the rank of the last stage holds: taken where it lies."""
        mine, rank = set(self._last.devices.flat), self._placement[-1]

        def one(leaf: jax.Array) -> jax.Array:
            if isinstance(leaf, Tracer):
                return leaf[rank * length : (rank + 1) * length]
            assert isinstance(leaf.sharding, NamedSharding)
            sharding = NamedSharding(self._last, P(None, *leaf.sharding.spec[1:]))
            parts = [shard.data for shard in leaf.addressable_shards if shard.device in mine]
            shape = (length, *leaf.shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=leaf.dtype)

        return jax.tree.map(one, tree)


@functools.lru_cache(maxsize=128)
def _forward_program(placement: tuple[int, ...], num_micro_batches: int) -> Program:
    return lower(placed_forward_only(placement, num_micro_batches))


def with_places(tree: Tree, shardings: Tree) -> Tree:
    """Abstract values that say where the leaves are."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=s), tree, shardings)
