"""The one interpreter of programs. Every ppermute of jaxpipe is on this page.

A tick: look up what this rank does, run that branch (idle runs none), then permute. The permutes sit outside of every
branch, because all ranks of an axis must take part in one. Each goes one way only, along edges that carry data in that
phase: several cycles in one permute are miscompiled on GPU, and an edge without data would make ranks wait for each other
without need. What the next stage reads on the same rank is put into its inbox and not permuted.

An arrival waits for the turn of the ops that it arrives behind (`executor/branch.py`). Without that the compiler for GPUs
stores it in front of them; and what a rank hands on as it arrived is permuted at the beginning of the next iteration, where
the first op waits for it. Then no transfer has work beside it.

XLA starts a permute as late as one loop in front of its end hides it. So the branches of one kind of op share a loop
(`executor/branch.py`), and what is not read by the first ops of the next tick arrives behind them
(`lowering/overlap.py`); if the next tick is in the next iteration, its permute is there, too. What is sent stays where it
was put until the next message of its kind, so that a tick neither makes nor fills a buffer.

On CPUs a permute blocks (`mesh.permutes_block`). If XLA put one between the ops of a tick, ranks that run the later ones
would run them while those that have run the earlier ones stand still: a tick would take as long as all its kinds of op
together. So there the permutes of a tick depend on all of its ops.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.executor import scopes
from jaxpipe.executor.branch import Branch, Carry, State, Step, behind, in_turn
from jaxpipe.executor.mail import Inbox, Mail
from jaxpipe.executor.whole_dims import with_whole_dims
from jaxpipe.executor.wire import Wire
from jaxpipe.lowering.overlap import phase_kinds, place_of_arrival
from jaxpipe.lowering.period import Loop
from jaxpipe.lowering.program import Cell
from jaxpipe.lowering.rows import Columns
from jaxpipe.mesh import PIPE


class Pause(NamedTuple, Generic[Carry]):
    """Something that all ranks do at once between ticks, for programs whose loop has one tick in its body.

    After `first` + `every` ticks, then after every `every` ticks, and after the last one: `run(turn, carry) -> carry`,
    turns counted from 0. The program has more than `first` ticks.
    """

    first: int
    every: int
    run: Callable[[jax.Array, Carry], Carry]


def run(
    mail: Mail,
    rank: jax.Array,
    branch_of: Callable[[str, int], Branch[Carry]],
    program_ids: Sequence[int],
    carry: Carry,
    pause: Pause[Carry] | None = None,
) -> Carry:
    """Runs a program inside `shard_map`.

    Args:
      mail: the program, and what travels in it.
      rank: this device's coordinate on the pipe axis, int32 [].
      branch_of: the branch of (kind of op, stage program).
      program_ids: per stage, the stage program it runs.
      carry: what the branches read and change.
      pause: interrupts the ticks.
    """
    program = mail.program
    columns = Columns.of(program)
    sent = dict.fromkeys(channel.value for channel in program.channels)
    state: State = carry, mail.empty_inbox(), {value: mail.blank(value) for value in sent}
    for loop in program.loops:
        phases = [_Phase(mail, columns, loop, number, branch_of, program_ids) for number in range(loop.period)]
        # One row after the other: [iterations, phases, ranks, columns], flat, so that a tick reads one contiguous piece.
        table = jnp.asarray(np.stack([phase.table for phase in phases], axis=1).reshape(-1))

        def body(iteration: jax.Array, both: Any, phases: Any = phases, table: jax.Array = table) -> Any:
            state, slots = both
            turn = jnp.int32(0)
            for number, phase in enumerate(phases):
                # What the phase before has sent late is permuted beside the ops of this one; what the last one has sent, by
                # the next iteration.
                under_way = phases[number - 1].send_late(state[2], slots)
                start = ((iteration * len(phases) + number) * program.num_ranks + rank) * len(columns)
                row = jax.lax.dynamic_slice_in_dim(table, start, len(columns))
                state, turn = phase.run(state, row, turn, under_way)
                slots = phase.late_slots(row)
            return state, slots

        start = state, phases[-1].late_slots(jnp.full(len(columns), -1, jnp.int32))
        # Not a scan: an array of iteration numbers would be the one buffer that grows with the number of micro-batches.
        if pause is None:
            state, _ = jax.lax.fori_loop(jnp.int32(0), jnp.int32(loop.num_iterations), body, start)
        else:
            assert loop.period == 1 and len(program.loops) == 1
            state, _ = _run_with_pauses(body, loop.num_iterations, pause, start)
    return state[0]


def _run_with_pauses(body: Any, num_ticks: int, pause: Pause[Carry], start: Any) -> Any:
    def one_round(turn: jax.Array, both: Any) -> Any:
        stop = pause.first + (turn + 1) * pause.every
        first = jnp.where(turn == 0, 0, stop - pause.every)  # the first round has the first ticks as well
        (carry, *messages), slots = jax.lax.fori_loop(first, jnp.minimum(stop, num_ticks), body, both)
        return (with_whole_dims(pause.run)(turn, carry), *messages), slots

    rounds = -((pause.first - num_ticks) // pause.every)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rounds), one_round, start)


def _named(branch: Branch[Carry], scope: str) -> Branch[Carry]:
    return branch._replace(run=jax.named_scope(scope)(with_whole_dims(branch.run)))


class _Phase:
    """One of the ticks in the body of a loop: its table [iterations, ranks, columns], its steps, its permutes."""

    def __init__(
        self,
        mail: Mail,
        columns: Columns,
        loop: Loop,
        number: int,
        branch_of: Callable[[str, int], Branch[Any]],
        program_ids: Sequence[int],
    ):
        program = mail.program
        self.mail, self.columns = mail, columns
        self._on_time: list[_Permute] = []
        self._late: list[_Permute] = []
        for channel, carrier in enumerate(program.channels):
            if edges := program.phase_edges(loop, number, channel):
                place = place_of_arrival(program, loop, number, channel)
                permute = _Permute(channel, carrier.value, () if carrier.is_local else edges, place or 0)
                (self._on_time if place is None else self._late).append(permute)
        kinds = phase_kinds(program, loop, number)
        names = sorted({(cell.kind, program_ids[cell.stage]) for _, cell in program.phase_cells(loop, number)})
        branches = {name: _named(branch_of(*name), scopes.of_op(*name, program_ids)) for name in names}
        one_kind = len(kinds) == 1 and not self._late

        def step_of(name: tuple[str, int]) -> tuple[int, bool]:
            # If no other kind of op runs beside a permute, those branches do that send nothing: that of the last rank.
            return kinds.index(name[0]), one_kind and not branches[name].sends

        used = sorted(names, key=lambda name: (step_of(name), name))
        self.steps = [
            Step(columns, {1 + used.index(name): branches[name] for name in group})
            for _, group in itertools.groupby(used, step_of)
        ]

        def row(cell: Cell) -> list[int]:
            branch = 0 if cell.stage < 0 else 1 + used.index((cell.kind, program_ids[cell.stage]))
            return columns.encode(cell, branch)

        self.table = np.zeros((loop.num_iterations, program.num_ranks, len(columns)), np.int32)
        self.table[:] = row(Cell())  # the last iteration may run past the ticks of the loop
        for iteration, tick in enumerate(loop.phase_ticks(number)):
            self.table[iteration] = [row(cell) for cell in program.cells[tick]]

    def run(
        self, state: State, row: jax.Array, turn: jax.Array, under_way: Sequence["_Arrival"]
    ) -> tuple[State, jax.Array]:
        """Runs the branch of this row, if it has one, then the permutes of the phase that are not late.

        Args:
          under_way: what the phase before has sent late.
        """
        if self.mail.poison:
            carry, inbox, outbox = state
            state = carry, inbox, {value: self.mail.blank(value) for value in outbox}
        for place, step in enumerate(self.steps):
            state, turn = step.run(self._received(state, under_way, place, turn), row, turn)
        carry, inbox, outbox = self._received(state, under_way, len(self.steps), turn)
        if self.mail.blocks:
            outbox = self._behind_all_ops(outbox, row, turn)
        arrive = self.columns.decode(row).arrive
        for permute in self._on_time:
            inbox = self._put(inbox, permute.value, arrive[permute.channel], permute.moved(outbox), turn)
        return (carry, inbox, outbox), turn

    def _behind_all_ops(self, outbox: Inbox, row: jax.Array, turn: jax.Array) -> Inbox:
        """The same messages, handed through a loop that comes behind all ops. It never runs, which XLA cannot know."""
        sent = sorted({permute.value for permute in (*self._on_time, *self._late) if permute.edges})
        never = self.columns.decode(row).branch < 0

        def change(messages: Inbox) -> Inbox:
            return jax.tree.map(jnp.zeros_like, messages)

        return {**outbox, **in_turn(turn, never, change, {value: outbox[value] for value in sent})[1]}

    def late_slots(self, row: jax.Array) -> list[jax.Array]:
        """The arrival slots of what this phase sends late, from its row."""
        return [self.columns.decode(row).arrive[permute.channel] for permute in self._late]

    def send_late(self, outbox: Inbox, slots: Sequence[jax.Array]) -> list["_Arrival"]:
        """Permutes what this phase has sent late."""
        both = zip(self._late, slots, strict=True)
        return [_Arrival(permute.place, permute.value, slot, permute.moved(outbox)) for permute, slot in both]

    def _received(self, state: State, under_way: Sequence["_Arrival"], place: int, turn: jax.Array) -> State:
        """The state with what arrives in this place, behind the step that gave `turn`."""
        carry, inbox, outbox = state
        for arrival in under_way:
            if arrival.place == place:
                inbox = self._put(inbox, arrival.value, arrival.slot, arrival.wire, turn)
        return carry, inbox, outbox

    def _put(self, inbox: Inbox, value: str, slot: jax.Array, wire: Wire, turn: jax.Array) -> Inbox:
        """Stores an arrival, not before the step that gave `turn` has ended."""
        if self.mail.is_direct(value):
            wire, _ = jax.lax.optimization_barrier((wire, turn))
        return self.mail.put(inbox, value, behind(turn, slot), wire)


class _Permute(NamedTuple):
    """A permute of a phase; without edges, what is sent stays on its rank.

    `place`: that of its arrival in the next phase, if it is late (see `lowering/overlap.py`).
    """

    channel: int
    value: str
    edges: Sequence[tuple[int, int]]
    place: int

    def moved(self, outbox: Inbox) -> Wire:
        sent = outbox[self.value]
        with jax.named_scope(scopes.PERMUTE):
            return [jax.lax.ppermute(leaf, PIPE, self.edges) for leaf in sent] if self.edges else sent


class _Arrival(NamedTuple):
    """What is under way: where in the phase it arrives, and in which slot."""

    place: int
    value: str
    slot: jax.Array
    wire: Wire
