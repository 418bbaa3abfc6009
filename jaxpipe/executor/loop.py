"""The one interpreter of programs. Every ppermute of jaxpipe is on this page.

A tick: look up what this rank does, run that branch (idle runs none), then permute. The permutes sit outside of every
branch, because all ranks of an axis must take part in one. Each goes one way only, along edges that carry data in that
phase: several cycles in one permute are miscompiled on GPU, and an edge without data would make ranks wait for each other
without need.

A branch is a `while_loop` of no or one iteration, not a case of a `switch`. XLA copies whatever passes through a
conditional, in idle ticks too, and that would be all gradients and all saved values; the carry of a loop is updated in
place. The loops of a tick read and write the same buffers, and only a data dependency tells XLA that one has read a buffer
before the next one writes it (without it, it copies the buffer): so each loop's trip count waits for the count of the one
before, its *turn*. With both, the compiled step holds no copy of a gradient or of saved values. Lastly, what a branch reads
passes a barrier together with its count: XLA would otherwise see that the work is the same in every iteration, and hoist it
out of the loop, into every tick of every rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.executor.store import blank
from jaxpipe.executor.wire import Wire
from jaxpipe.lowering.period import Loop
from jaxpipe.lowering.program import Cell, Program
from jaxpipe.lowering.rows import Columns, Now
from jaxpipe.mesh import PIPE

# What the branches read and change: a dataclass that is a pytree.
Carry = TypeVar("Carry", bound=Any)
Changed = TypeVar("Changed")
# What has arrived and what is sent, by kind of value: `Y` or `DX`.
Inbox = dict[str, Wire]


class Branch(NamedTuple, Generic[Carry]):
    """What a rank may do in a tick.

    Attributes:
      run: `run(carry, inbox, now) -> (carry, what is sent)`.
      changes: the fields of the carry that it changes. Only these go through the branch's loop.
    """

    run: Callable[[Carry, Inbox, Now], tuple[Carry, Inbox]]
    changes: tuple[str, ...]


class Pause(NamedTuple, Generic[Carry]):
    """Something that all ranks do at once between ticks, for programs whose loop has one tick in its body.

    After `first` + `every` ticks, then after every `every` ticks, and after the last one: `run(turn, carry) -> carry`,
    turns counted from 0. The program has more than `first` ticks.
    """

    first: int
    every: int
    run: Callable[[jax.Array, Carry], Carry]


@dataclass(frozen=True)
class Mail:
    """What travels in a program: how arrivals are kept, and how they are read.

    Attributes:
      wires: per kind of value, the shapes of a message.
      poison: fill what nothing was written to with NaN instead of zeros.
    """

    program: Program
    wires: Mapping[str, Sequence[jax.ShapeDtypeStruct]]
    poison: bool = False

    def is_direct(self, value: str) -> bool:
        """With one slot and no permute between arrival and use, what arrives is used as it is, without a copy."""
        return self.program.inboxes[value] == 1 and value in self.program.direct

    def empty_inbox(self) -> Inbox:
        """The arrival slots before the first tick."""
        return {
            value: self._blank(value, () if self.is_direct(value) else (size,))
            for value, size in self.program.inboxes.items()
        }

    def blank(self, value: str) -> Wire:
        """A message that nothing was written to."""
        return self._blank(value, ())

    def _blank(self, value: str, lead: tuple[int, ...]) -> Wire:
        return [blank((*lead, *spec.shape), spec.dtype, self.poison) for spec in self.wires[value]]

    def put(self, inbox: Inbox, value: str, slot: jax.Array, wire: Wire) -> Inbox:
        """Stores an arrival; slot -1 leaves everything as it is. (`where` on the row, so that XLA updates in place.)"""
        if self.is_direct(value):
            return {**inbox, value: wire}
        at = jnp.maximum(slot, 0)
        old = zip(inbox[value], wire, strict=True)
        return {**inbox, value: [kept.at[at].set(jnp.where(slot >= 0, new, kept[at])) for kept, new in old]}

    def read(self, inbox: Inbox, value: str, now: Now) -> Wire:
        """The message of that kind which the present op reads."""
        if self.is_direct(value):
            return inbox[value]
        return [leaf[now.read] for leaf in inbox[value]]


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
    state = carry, mail.empty_inbox()
    for loop in program.loops:
        phases = [_Phase(mail, columns, loop, number, branch_of, program_ids) for number in range(loop.period)]
        # One row after the other: [iterations, phases, ranks, columns], flat, so that a tick reads one contiguous piece.
        table = jnp.asarray(np.stack([phase.table for phase in phases], axis=1).reshape(-1))

        def body(iteration: jax.Array, state: Any, phases: Any = phases, table: jax.Array = table) -> Any:
            carry, inbox = state
            turn = jnp.int32(0)
            for number, phase in enumerate(phases):
                start = ((iteration * len(phases) + number) * program.num_ranks + rank) * len(columns)
                row = jax.lax.dynamic_slice_in_dim(table, start, len(columns))
                carry, inbox, turn = phase.run(carry, inbox, row, turn)
            return carry, inbox

        # Not a scan: an array of iteration numbers would be the one buffer that grows with the number of micro-batches.
        if pause is None:
            state = jax.lax.fori_loop(jnp.int32(0), jnp.int32(loop.num_iterations), body, state)
        else:
            assert loop.period == 1 and len(program.loops) == 1
            state = _run_with_pauses(body, loop.num_iterations, pause, state)
    return state[0]


def _run_with_pauses(body: Any, num_ticks: int, pause: Pause[Carry], state: tuple[Carry, Inbox]) -> tuple[Carry, Inbox]:
    def one_round(turn: jax.Array, state: tuple[Carry, Inbox]) -> tuple[Carry, Inbox]:
        stop = pause.first + (turn + 1) * pause.every
        start = jnp.where(turn == 0, 0, stop - pause.every)  # the first round has the first ticks as well
        carry, inbox = jax.lax.fori_loop(start, jnp.minimum(stop, num_ticks), body, state)
        return pause.run(turn, carry), inbox

    rounds = -((pause.first - num_ticks) // pause.every)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rounds), one_round, state)


def run_if(wanted: jax.Array, function: Callable[..., Changed], changed: Changed, *operands: Any) -> Changed:
    """`function(changed, *operands)` if `wanted`, else `changed`; a loop of no or one iteration, like every branch here."""

    def once(state: Any) -> Any:
        ran, changed = state
        ran, here = jax.lax.optimization_barrier((ran, operands))
        return ran + 1, function(changed, *here)

    times = wanted.astype(jnp.int32)
    return jax.lax.while_loop(lambda state: state[0] < times, once, (jnp.int32(0), changed))[1]


class _Phase:
    """One of the ticks in the body of a loop: its table [iterations, ranks, columns], its branches, its permutes."""

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
        every = enumerate(program.channels)
        self.permutes = [(n, c.value, edges) for n, c in every if (edges := program.phase_edges(loop, number, n))]
        used = sorted({(cell.kind, program_ids[cell.stage]) for _, cell in program.phase_cells(loop, number)})
        self.branches = [branch_of(kind, program_id) for kind, program_id in used]

        def row(cell: Cell) -> list[int]:
            branch = 0 if cell.stage < 0 else 1 + used.index((cell.kind, program_ids[cell.stage]))
            return columns.encode(cell, branch)

        self.table = np.zeros((loop.num_iterations, program.num_ranks, len(columns)), np.int32)
        self.table[:] = row(Cell())  # the last iteration may run past the ticks of the loop
        for iteration, tick in enumerate(loop.phase_ticks(number)):
            self.table[iteration] = [row(cell) for cell in program.cells[tick]]

    def run(self, carry: Any, inbox: Inbox, row: jax.Array, turn: jax.Array) -> tuple[Any, Inbox, jax.Array]:
        """Runs the branch of this row, if it has one, then all permutes of the phase."""
        decoded = self.columns.decode(row)
        sent = {value: self.mail.blank(value) for value in dict.fromkeys(value for _, value, _ in self.permutes)}
        for number, branch in enumerate(self.branches, start=1):

            def once(state: Any, branch: Branch[Any] = branch, carry: Any = carry) -> Any:
                ran, changed, outbox = state
                ran, arrived, here = jax.lax.optimization_barrier((ran, inbox, row))
                after, sent = branch.run(replace(carry, **changed), arrived, self.columns.decode(here).now)
                outbox = {value: sent.get(value, wire) for value, wire in outbox.items()}
                return ran + 1, {name: getattr(after, name) for name in changed}, outbox

            # `turn` is 0 or 1, which XLA cannot know: the condition only ties this loop to the one before.
            times = jnp.where(turn <= 1, (decoded.branch == number).astype(jnp.int32), 0)
            changed = {name: getattr(carry, name) for name in branch.changes}
            turn, changed, sent = jax.lax.while_loop(
                lambda state, times=times: state[0] < times, once, (jnp.int32(0), changed, sent)
            )
            carry = replace(carry, **changed)
        for channel, value, edges in self.permutes:
            moved = [jax.lax.ppermute(leaf, PIPE, edges) for leaf in sent[value]]
            inbox = self.mail.put(inbox, value, decoded.arrive[channel], moved)
        return carry, inbox, turn
