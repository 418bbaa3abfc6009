"""Runs a grouped trace: on the ranks level by level, with one packed gather between two levels.

Per level one `shard_map`. In it each rank computes its own layers, so that nothing moves by construction, whatever a
partitioner knows of a primitive. What values without home need leaves it by an `all_gather`; small ones travel together.
Between the levels, equations without home run as they were traced, in the order of the layers, on gathered rows: padding is
in no layer and never enters, and sums have one order, however the model is cut.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.mesh import PIPE, manual_axes
from jaxpipe.model.layout import Layout
from jaxpipe.optimizer.collect import everywhere
from jaxpipe.optimizer.groups import Grouped
from jaxpipe.optimizer.rows import Rows
from jaxpipe.optimizer.trace import Value

P = PartitionSpec
Key = Any  # of a batch
Target = tuple[str, int, Any] | None  # of an output: (stack, layer, name of the stored array), or not in a stack


def run(
    grouped: Grouped,
    layout: Layout,
    mesh: Mesh,
    inputs: Sequence[Any],
    held: dict[Key, jax.Array],
    targets: Sequence[Target],
) -> tuple[dict[tuple[str, Any], jax.Array], list[Any]]:
    """The results of a trace; traceable.

    Args:
      inputs: per input of the trace its value, or None for those with a home.
      held: the inputs with a home, [S, slots, ...], by their batch.
      targets: per output, where it is to be stored.

    Returns:
      Those stored in stacks, [S, slots, ...], by (stack, name); and the others, in order.
    """
    return _Run(grouped, layout, mesh, inputs, held, targets).everything()


class _Run:
    def __init__(self, grouped: Grouped, layout: Layout, mesh: Mesh, inputs: Any, held: Any, targets: Any):
        self.grouped, self.layout, self.mesh, self.targets = grouped, layout, mesh, targets
        trace = grouped.trace
        self.known = {v: a for v, a in zip(trace.inputs, inputs, strict=True) if v.home is None}
        self.held = dict(held)
        self.slots: dict[Key, list[int]] = {key: list(range(a.shape[1])) for key, a in held.items()}
        self.copies: dict[Key, jax.Array] = {}  # [S, K, ...] on all ranks
        self.ends: dict[tuple[str, Any], dict[tuple[int, int], Value]] = {}  # per stack to return, its rows
        for value, target in zip(trace.outputs, targets, strict=True):
            if target is not None:
                stack, layer, name = target
                self.ends.setdefault((stack, name), {})[layout.stacks[stack].places[layer]] = value
        self.made = grouped.made_at()
        self.reads = {level: grouped.reads(level) for level in grouped.groups}
        self.reads[grouped.last] = {v for rows in self.ends.values() for v in rows.values()}
        self.last_read = {v.batch: level for level in sorted(self.reads) for v in self.reads[level] if v.home}

    def everything(self) -> tuple[dict[tuple[str, Any], jax.Array], list[Any]]:
        stored: dict[tuple[str, Any], jax.Array] = {}
        for level in range(-1, self.grouped.last + 1):
            if level >= 0:
                stored |= self._on_ranks(level)
            for eqn in self.grouped.plain.get(level, ()):
                self.known.update(zip(eqn.outputs, eqn.bind(*map(self._read, eqn.inputs)), strict=True))
        rest = [self._read(v) for v, t in zip(self.grouped.trace.outputs, self.targets, strict=True) if t is None]
        return stored, rest

    def _read(self, v: Value) -> Any:
        if v.home is None:
            return v.constant if v.constant is not None else self.known[v]
        rank, slot = self.layout.stacks[v.home[0]].places[v.home[1]]
        return self.copies[v.batch][rank, self.slots[v.batch].index(slot)]

    def _on_ranks(self, level: int) -> dict[tuple[str, Any], jax.Array]:
        """Runs the groups of a level; in the last one, the stacks to return are put together."""
        groups = self.grouped.groups.get(level, [])
        ends = self.ends if level == self.grouped.last else {}
        wanted = [key for key in self.grouped.gathered if self.made.get(key, 0) == level]
        keep = [key for key, at in self.made.items() if at == level and self.last_read.get(key, -1) > level]
        taken = [key for key in self.held if self.last_read.get(key, -1) >= level or key in wanted]
        loose = [v for v in self.reads.get(level, ()) if v.home is None and v.constant is None]
        if not (groups or ends or wanted):
            return {}

        def on_rank(rank: jax.Array, batches: list[jax.Array], values: list[Any]) -> Any:
            rows = Rows(
                rank[0],
                self.layout.num_ranks,
                self.layout.stacks,
                {key: a[0] for key, a in zip(taken, batches, strict=True)},
                self.slots,
                dict(zip(loose, values, strict=True)),
            )
            for group in groups:
                rows.compute(group)
            done = [rows.stored(self.layout.stacks[stack], each)[None] for (stack, _), each in ends.items()]
            kept = [rows.batches[key][None] for key in keep]
            return kept, everywhere([rows.batches[key] for key in wanted], self.mesh), done

        kept, copies, done = jax.shard_map(
            on_rank,
            mesh=self.mesh,
            in_specs=(P(PIPE), P(PIPE), P()),
            out_specs=(P(PIPE), P(), P(PIPE)),
            axis_names=manual_axes(self.mesh),
            check_vma=False,  # optimizers do not annotate what varies
        )(self._ranks(), [self.held[key] for key in taken], [self.known[v] for v in loose])
        self.held.update(zip(keep, kept, strict=True))
        self.copies.update(zip(wanted, copies, strict=True))
        return dict(zip(ends, done, strict=True))

    def _ranks(self) -> jax.Array:
        return jax.numpy.arange(self.layout.num_ranks, dtype=jax.numpy.int32)
