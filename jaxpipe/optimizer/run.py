"""Runs a grouped trace level by level on the ranks, with one packed gather between two levels.

There is one `shard_map` per level. In it each rank computes its own layers, so nothing can move between ranks, whatever a
partitioner knows about a primitive. The values that equations without a home need leave it by an `all_gather`, the small
ones together. Between the levels, the equations without a home run as they were traced, on the gathered rows, in the order
of the layers. Padding belongs to no layer and never enters, and sums have one order, however the model is cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxpipe.layout.layout import Layout
from jaxpipe.mesh import PIPE, manual_axes
from jaxpipe.optimizer import padded
from jaxpipe.optimizer.collect import everywhere
from jaxpipe.optimizer.groups import Grouped
from jaxpipe.optimizer.rows import Rows
from jaxpipe.optimizer.trace import ArrayKey, Value

P = PartitionSpec
ArrayName = tuple[int, str]  # of an array in a stack: (number of the result that it is a part of, its name there)
Target = tuple[str, int, ArrayName] | None  # where an output is stored: (stack, layer, array), or in no stack
Stacked = dict[tuple[str, ArrayName], jax.Array]  # results [S, slots, ...] by stack and name


def run(
    grouped: Grouped,
    layout: Layout,
    mesh: Mesh,
    inputs: Sequence[ArrayLike | None],
    held: Mapping[ArrayKey, jax.Array],
    targets: Sequence[Target],
) -> tuple[Stacked, list[ArrayLike]]:
    """Computes the results of a trace; traceable.

    Args:
      inputs: for each input of the trace, its value; None for those with a home.
      held: the arrays [S, slots, ...] that hold the inputs with a home, by key. These and `inputs` may have padding.
      targets: for each output, where it is to be stored.

    Returns:
      The results that are stored in stacks, [S, slots, ...]; and the others, in the order of the outputs. They may have
      padding, filled with zeros.
    """
    return _Run(grouped, layout, mesh, inputs, held, targets).everything()


class _Run:
    def __init__(
        self,
        grouped: Grouped,
        layout: Layout,
        mesh: Mesh,
        inputs: Sequence[ArrayLike | None],
        held: Mapping[ArrayKey, jax.Array],
        targets: Sequence[Target],
    ):
        self.grouped, self.layout, self.mesh, self.targets = grouped, layout, mesh, targets
        trace = grouped.trace
        self.known: dict[Value, Any] = {v: a for v, a in zip(trace.inputs, inputs, strict=True) if v.home is None}
        self.held = dict(held)
        self.slots: dict[ArrayKey, list[int]] = {key: list(range(a.shape[1])) for key, a in held.items()}
        self.copies: dict[ArrayKey, jax.Array] = {}  # [S, K, ...] on all ranks
        # For each array to return, the value at each (rank, slot).
        self.ends: dict[tuple[str, ArrayName], dict[tuple[int, int], Value]] = {}
        # Results that belong to one layer and are stored with another one, each as a value without a home.
        self.moved: dict[Value, Value] = {}
        for value, target in zip(trace.outputs, targets, strict=True):
            if target is not None:
                stack, layer, name = target
                if value.home and value.home != (stack, layer):
                    value = self.moved.setdefault(value, Value(value.aval))
                self.ends.setdefault((stack, name), {})[layout.stacks[stack].places[layer]] = value
        self.made = grouped.made_at()
        values = [*trace.inputs, *(v for eqn in trace.equations for v in eqn.outputs)]
        self.shapes = {v.held_in: v.aval.shape for v in values if v.home}
        self.reads = {level: grouped.reads(level) for level in grouped.groups}
        self.reads[grouped.last] = list(dict.fromkeys(v for rows in self.ends.values() for v in rows.values()))
        self.last_read = {v.held_in: level for level in sorted(self.reads) for v in self.reads[level] if v.home}

    def everything(self) -> tuple[Stacked, list[ArrayLike]]:
        stored: Stacked = {}
        for level in range(-1, self.grouped.last + 1):
            if level == self.grouped.last:
                self.known.update((alone, self._read(value)) for value, alone in self.moved.items())
            if level >= 0:
                stored |= self._on_ranks(level)
            for eqn in self.grouped.plain.get(level, ()):
                self.known.update(zip(eqn.outputs, padded.compute(eqn, list(map(self._read, eqn.inputs))), strict=True))
        outputs = [v for v, t in zip(self.grouped.trace.outputs, self.targets, strict=True) if t is None]
        rest = [padded.zeroed(self._read(v), v.aval.shape) for v in outputs]
        return stored, rest

    def _read(self, v: Value) -> ArrayLike:
        """The numbers of a value, on all ranks; those without a home may have padding."""
        if v.home is None:
            return v.constant if v.constant is not None else self.known[v]
        rank, slot = self.layout.stacks[v.home[0]].places[v.home[1]]
        return self.copies[v.held_in][rank, self.slots[v.held_in].index(slot)]

    def _on_ranks(self, level: int) -> Stacked:
        """Runs the groups of a level. The last level puts the stacks to return together."""
        groups = self.grouped.groups.get(level, [])
        ends = self.ends if level == self.grouped.last else {}
        wanted = [key for key in self.grouped.gathered if self.made.get(key, 0) == level]
        keep = [key for key, at in self.made.items() if at == level and self.last_read.get(key, -1) > level]
        taken = [key for key in self.held if self.last_read.get(key, -1) >= level or key in wanted]
        loose = [v for v in self.reads.get(level, ()) if v.home is None and v.constant is None]
        if not (groups or ends or wanted):
            return {}

        def on_rank(
            rank: jax.Array, arrays: list[jax.Array], values: list[ArrayLike]
        ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
            rows = Rows(
                rank[0],
                self.layout.num_ranks,
                self.layout.stacks,
                {key: a[0] for key, a in zip(taken, arrays, strict=True)},
                self.slots,
                dict(zip(loose, values, strict=True)),
            )
            for group in groups:
                rows.compute(group)
            done = [rows.stored(self.layout.stacks[stack], each)[None] for (stack, _), each in ends.items()]
            kept = [rows.arrays[key][None] for key in keep]
            sent = [padded.fitted(a := rows.arrays[key], (a.shape[0], *self.shapes[key])) for key in wanted]
            return kept, everywhere(sent, self.mesh), done

        kept, copies, done = jax.shard_map(
            on_rank,
            mesh=self.mesh,
            in_specs=(P(PIPE), P(PIPE), P()),
            out_specs=(P(PIPE), P(), P(PIPE)),
            # Arrays cut over the data ranks are left to the compiler: what treats entries separately moves nothing.
            axis_names=frozenset({PIPE}) if self.layout.cuts_data else manual_axes(self.mesh),
            check_vma=False,  # optimizers do not annotate what varies
        )(self._ranks(), [self.held[key] for key in taken], [self.known[v] for v in loose])
        self.held.update(zip(keep, kept, strict=True))
        self.copies.update(zip(wanted, copies, strict=True))
        return dict(zip(ends, done, strict=True))

    def _ranks(self) -> jax.Array:
        return jax.numpy.arange(self.layout.num_ranks, dtype=jax.numpy.int32)
