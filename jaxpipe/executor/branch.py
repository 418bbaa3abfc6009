"""Branches: what a rank may do in a tick, as loops of no or one iteration.

Such a `while_loop` is used and not a case of a `switch`, because XLA copies whatever passes through a conditional, in idle
ticks too, and that would be all gradients and all saved values; the carry of a loop is updated in place. More facts:

- The loops of a tick read and write the same buffers, and only a data dependency tells XLA that one has read a buffer
  before the next one writes it (without it, it copies the buffer): so each loop's trip count waits for the count of the
  one before, its *turn*.
- What a branch reads passes a barrier together with its count: XLA would otherwise see that the work is the same in every
  iteration, and hoist it out of the loop, into every tick of every rank.
- A branch is handed what it reads and nothing else. Each loop has one layout for each of its operands, and one that it only
  hands on it would have in the default layout: a copy in every tick.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxpipe.executor.mail import Inbox
from jaxpipe.lowering.rows import Columns, Now

# What the branches read and change: a dataclass that is a pytree.
Carry = TypeVar("Carry", bound=Any)
Changed = TypeVar("Changed")
# What goes round the ticks: the carry, what has arrived, and what was sent last.
State = tuple[Any, Inbox, Inbox]


class Branch(NamedTuple, Generic[Carry]):
    """What a rank may do in a tick.

    Attributes:
      run: `run(carry, inbox, now) -> (carry, what is sent)`.
      changes: the fields of the carry that it changes. Only these go through the branch's loop.
      reads, sends: the kinds of values that it reads from the inbox and that it sends. It is given no others.
    """

    run: Callable[[Carry, Inbox, Now], tuple[Carry, Inbox]]
    changes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    sends: tuple[str, ...] = ()


def run_if(wanted: jax.Array, function: Callable[..., Changed], changed: Changed, *operands: Any) -> Changed:
    """`function(changed, *operands)` if `wanted`, else `changed`; a loop of no or one iteration, like every branch here."""
    return in_turn(jnp.int32(0), wanted, function, changed, *operands)[1]


def in_turn(
    turn: jax.Array, wanted: jax.Array, function: Callable[..., Changed], changed: Changed, *operands: Any
) -> tuple[jax.Array, Changed]:
    """`run_if` after the loop that gave `turn`; also gives the turn of this one."""

    def once(state: Any) -> Any:
        ran, changed = state
        ran, here = jax.lax.optimization_barrier((ran, operands))
        return ran + 1, function(changed, *here)

    times = behind(turn, wanted.astype(jnp.int32))
    return jax.lax.while_loop(lambda state: state[0] < times, once, (jnp.int32(0), changed))


def behind(turn: jax.Array, number: jax.Array) -> jax.Array:
    """`number` as it is, once the loop that gave `turn` has ended. XLA cannot know that a turn is 0 or 1."""
    return jnp.where(turn <= 1, number, 0)


class Step:
    """The branches of one kind of op in a phase, in one loop: what is permuted behind it has all other ops to overlap with.

    Args:
      branches: by the number that the table has for them.
    """

    def __init__(self, columns: Columns, branches: Mapping[int, Branch[Any]]):
        def all_of(found: Callable[[Branch[Any]], tuple[str, ...]]) -> list[str]:
            return list(dict.fromkeys(name for branch in branches.values() for name in found(branch)))

        self.columns, self.branches = columns, branches
        self.changes = all_of(lambda branch: branch.changes)
        self.reads = all_of(lambda branch: branch.reads)
        self.sends = all_of(lambda branch: branch.sends)

    def run(self, state: State, row: jax.Array, turn: jax.Array) -> tuple[State, jax.Array]:
        """Runs the branch of this row, if it is one of these."""
        carry, inbox, outbox = state
        changed = {name: getattr(carry, name) for name in self.changes}
        sent = {value: outbox[value] for value in self.sends}

        def one(branch: Branch[Any]) -> Callable[..., Any]:
            def run(state: Any, arrived: Inbox, row: jax.Array) -> Any:
                changed, sent = state
                after, made = branch.run(replace(carry, **changed), arrived, self.columns.decode(row).now)
                assert set(made) == set(branch.sends), f"sends {sorted(made)} and not {branch.sends}"
                return {name: getattr(after, name) for name in changed}, {**sent, **made}

            return run

        def any_of_these(state: Any, arrived: Inbox, row: jax.Array) -> Any:
            turn = jnp.int32(0)
            for number, branch in self.branches.items():
                wanted = self.columns.decode(row).branch == number
                mine = {value: arrived[value] for value in branch.reads}
                turn, state = in_turn(turn, wanted, one(branch), state, mine, row)
            return state

        numbers = list(self.branches)
        work = one(self.branches[numbers[0]]) if len(numbers) == 1 else any_of_these
        asked = self.columns.decode(row).branch
        wanted = (asked >= numbers[0]) & (asked <= numbers[-1])
        arrived = {value: inbox[value] for value in self.reads}
        turn, (changed, sent) = in_turn(turn, wanted, work, (changed, sent), arrived, row)
        return (replace(carry, **changed), inbox, {**outbox, **sent}), turn
