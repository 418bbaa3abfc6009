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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.executor.store import blank
from jaxpipe.executor.wire import Wire
from jaxpipe.lowering.channels import BACKWARD, FORWARD
from jaxpipe.lowering.program import Cell, Program
from jaxpipe.mesh import PIPE

State = dict[str, Any]
Inbox = dict[str, Wire]


class Now(NamedTuple):
    """The row of this tick and rank, as traced integers (slots of -1 mean none)."""

    micro_batch: jax.Array
    saved: jax.Array
    read: jax.Array


# branch(state, inbox, now) -> (the entries of the state that it changes, {direction: wire}), and the names of those entries
Branch = tuple[Callable[[State, Inbox, Now], tuple[State, Inbox]], Sequence[str]]


class Pause(NamedTuple):
    """Something that all ranks do at once between ticks, for programs whose loop has one tick in its body.

    After `first` + `every` ticks, then after every `every` ticks, and after the last one: `run(turn, state) -> state`,
    turns counted from 0. The program has more than `first` ticks.
    """

    first: int
    every: int
    run: Callable[[jax.Array, State], State]


class Wires(NamedTuple):
    """Shapes of what is permuted in each direction."""

    forward: Sequence[jax.ShapeDtypeStruct]
    backward: Sequence[jax.ShapeDtypeStruct]


def run(
    program: Program,
    rank: jax.Array,
    branch_of: Callable[[str, int], Branch],
    program_ids: Sequence[int],
    state: State,
    wires: Wires,
    *,
    poison: bool = False,
    pause: Pause | None = None,
) -> State:
    """Runs a program inside `shard_map`.

    Args:
      rank: this device's coordinate on the pipe axis.
      branch_of: the branch of (kind of op, stage program).
      program_ids: per stage, the stage program it runs.
      state: what the branches read and change, by name.
      wires: shapes of the messages.
      poison: fill buffers and messages that nothing was written to with NaN instead of zeros.
      pause: interrupts the ticks.
    """
    sizes = {FORWARD: program.forward_slots, BACKWARD: program.backward_slots}
    specs = {FORWARD: wires.forward, BACKWARD: wires.backward}
    directions = [d for d in (FORWARD, BACKWARD) if sizes[d]]
    # With one slot and no permute between arrival and use, what arrives is used as it is, without a copy.
    direct = {d: sizes[d] == 1 and program.is_direct(d) for d in directions}
    inbox: Inbox = {
        d: [blank(s.shape if direct[d] else (sizes[d], *s.shape), s.dtype, poison) for s in specs[d]]
        for d in directions
    }

    for loop in program.loops:
        phases = [_Phase(program, loop, phase, branch_of, program_ids) for phase in range(loop.period)]
        table = jnp.asarray(np.stack([phase.table for phase in phases], axis=1).reshape(-1))
        shape = (loop.num_iterations, loop.period, program.num_ranks, _Phase.COLUMNS)

        def body(iteration: jax.Array, carry: Any, phases: Any = phases, table: Any = table, shape: Any = shape) -> Any:
            state, inbox = carry
            turn = jnp.int32(0)
            for phase in phases:
                start = ((iteration * shape[1] + phase.number) * shape[2] + rank) * shape[3]
                row = jax.lax.dynamic_slice_in_dim(table, start, shape[3])
                now = Now(row[1], row[2], row[3])
                state, outbox, turn = phase.run(state, inbox, now, row[0], turn, specs, directions, poison)
                arrive = {FORWARD: row[4], BACKWARD: row[5]}
                inbox = dict(inbox)
                for direction, wire in outbox.items():
                    moved = [jax.lax.ppermute(leaf, PIPE, phase.edges[direction]) for leaf in wire]
                    inbox[direction] = moved if direct[direction] else _put(inbox[direction], arrive[direction], moved)
            return state, inbox

        # Not a scan: an array of iteration numbers would be the one buffer that grows with the number of micro-batches.
        if pause is None:
            state, inbox = jax.lax.fori_loop(jnp.int32(0), jnp.int32(loop.num_iterations), body, (state, inbox))
        else:
            assert loop.period == 1 and len(program.loops) == 1
            state, inbox = _run_with_pauses(body, loop.num_iterations, pause, (state, inbox))
    return state


def _run_with_pauses(body: Any, num_ticks: int, pause: Pause, carry: tuple[State, Inbox]) -> tuple[State, Inbox]:
    def one_round(turn: jax.Array, carry: tuple[State, Inbox]) -> tuple[State, Inbox]:
        stop = pause.first + (turn + 1) * pause.every
        start = jnp.where(turn == 0, 0, stop - pause.every)  # the first round has the first ticks as well
        state, inbox = jax.lax.fori_loop(start, jnp.minimum(stop, num_ticks), body, carry)
        return pause.run(turn, state), inbox

    rounds = -((pause.first - num_ticks) // pause.every)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rounds), one_round, carry)


def run_if(wanted: jax.Array, function: Callable[..., State], changed: State, *operands: Any) -> State:
    """`function(changed, *operands)` if `wanted`, else `changed`; a loop of no or one iteration, like every branch here."""

    def once(carry: Any) -> Any:
        ran, changed = carry
        ran, here = jax.lax.optimization_barrier((ran, operands))
        return ran + 1, function(changed, *here)

    times = wanted.astype(jnp.int32)
    return jax.lax.while_loop(lambda carry: carry[0] < times, once, (jnp.int32(0), changed))[1]


class _Phase:
    """One of the ticks in the body of a loop: its table, its branches, its edges."""

    COLUMNS = 6

    def __init__(self, program: Program, loop: Any, number: int, branch_of: Any, program_ids: Sequence[int]):
        self.number = number
        self.edges = {d: edges for d in (FORWARD, BACKWARD) if (edges := program.phase_edges(loop, number, d))}
        used = sorted({(cell.kind, program_ids[cell.stage]) for _, cell in program.phase_cells(loop, number)})
        self.branches = [branch_of(kind, program_id) for kind, program_id in used]
        self.table = np.zeros((loop.num_iterations, program.num_ranks, self.COLUMNS), np.int32)
        for iteration, tick in enumerate(loop.phase_ticks(number)):
            for rank, cell in enumerate(program.cells[tick]):
                self.table[iteration, rank] = _row(cell, used, program_ids)
        for iteration in range(len(loop.phase_ticks(number)), loop.num_iterations):
            self.table[iteration] = _row(Cell(), used, program_ids)

    def run(
        self,
        state: State,
        inbox: Inbox,
        now: Now,
        branch: jax.Array,
        turn: jax.Array,
        specs: Any,
        directions: Any,
        poison: bool,
    ) -> tuple[State, Inbox, jax.Array]:
        out = [d for d in directions if d in self.edges]
        outbox = {d: [blank(s.shape, s.dtype, poison) for s in specs[d]] for d in out}
        for number, (function, changes) in enumerate(self.branches, start=1):

            def once(carry: Any, function: Any = function, state: State = state) -> Any:
                ran, changed, outbox = carry
                ran, arrived, here = jax.lax.optimization_barrier((ran, inbox, now))
                changed, sent = function({**state, **changed}, arrived, here)
                return ran + 1, changed, {d: sent.get(d, outbox[d]) for d in out}

            # `turn` is 0 or 1, which XLA cannot know: the condition only ties this loop to the one before.
            times = jnp.where(turn <= 1, (branch == number).astype(jnp.int32), 0)
            changed = {name: state[name] for name in changes}
            turn, changed, outbox = jax.lax.while_loop(
                lambda carry, times=times: carry[0] < times, once, (jnp.int32(0), changed, outbox)
            )
            state = {**state, **changed}
        return state, outbox, turn


def _row(cell: Cell, used: list[tuple[str, int]], program_ids: Sequence[int]) -> list[int]:
    branch = 0 if cell.stage < 0 else 1 + used.index((cell.kind, program_ids[cell.stage]))
    return [branch, cell.micro_batch, cell.saved, cell.read, cell.arrive_forward, cell.arrive_backward]


def _put(slots: Wire, slot: jax.Array, wire: Wire) -> Wire:
    """Stores an arrival; slot -1 leaves everything as it is. (`where` on the row, so that XLA updates in place.)"""
    at = jnp.maximum(slot, 0)
    return [old.at[at].set(jnp.where(slot >= 0, new, old[at])) for old, new in zip(slots, wire, strict=True)]


def message(program: Program, inbox: Inbox, direction: str, now: Now) -> Wire:
    """The message that the current op reads."""
    size = program.forward_slots if direction == FORWARD else program.backward_slots
    if size == 1 and program.is_direct(direction):
        return inbox[direction]
    return [leaf[now.read] for leaf in inbox[direction]]
