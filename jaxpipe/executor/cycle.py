"""Ticks that go round: the loop in which tokens are generated. It has permutes of its own, which no other loop needs.

    rank 0 | a0 b0 c0 d0 a1 b1 c1 d1 a2 ...      four groups of rows, a to d; a1 is the second token of group a
    rank 1 | .. a0 b0 c0 d0 a1 b1 c1 d1 ...
    rank 2 | .. .. a0 b0 c0 d0 a1 b1 c1 ...
    rank 3 | .. .. .. a0 b0 c0 d0 a1 b1 ...      d0 runs while a1 begins: the token of a has just arrived at rank 0

With as many groups as ranks, the token that the last rank has chosen arrives at the first one in the tick that needs it, so
no rank waits for another. Where ranks have several stages, it is the same with longer rounds: `executor/rounds.py` says
which rank runs which group when.

It is not the loop of `executor/loop.py`, although its table would be that of a forward-only schedule. That table would have
a column per token and group, thousands of them, to say what one remainder says; a program of a known number of ticks cannot
end when every row has ended; and no schedule has a message from the last rank back to the first one.

The rules for permutes are the same: outside of all branches, and each one goes one way. The tokens go back by a permute of
their own, so that none is a cycle.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.executor import scopes
from jaxpipe.executor.branch import Carry, in_turn
from jaxpipe.executor.rounds import Rounds
from jaxpipe.executor.store import blank
from jaxpipe.executor.whole_dims import with_whole_dims
from jaxpipe.executor.wire import Wire
from jaxpipe.mesh import PIPE


class Item(NamedTuple):
    """A piece of work: which group of rows, which turn of that group, counted from 0, and which stage; int32 [] each."""

    group: jax.Array
    turn: jax.Array
    stage: jax.Array


class Cycle(NamedTuple, Generic[Carry]):
    """What goes round.

    Attributes:
      rounds: who runs which stage of which group when.
      turns: of each group.
      branches: per stage program, `run(carry, what has arrived, item) -> (carry, what is sent)`.
      program_ids: per stage, the stage program that it runs.
      wire: the shapes of a message.
      wanted: `wanted(carry, item)`, bool []; what is not wanted is skipped. All devices of a rank agree about it.
      back: `back(carry, item)`: what the rank of the last stage tells that of the first one when it has run an item.
      arrived: `arrived(carry, message, item, mine)`: takes that; `mine` is false where nothing has arrived.
      poison: fill messages that nobody has sent with NaN instead of zeros.
    """

    rounds: Rounds
    turns: int
    branches: Sequence[Callable[[Carry, Wire, Item], tuple[Carry, Wire]]]
    program_ids: Sequence[int]
    wire: Sequence[jax.ShapeDtypeStruct]
    wanted: Callable[[Carry, Item], jax.Array]
    back: Callable[[Carry, Item], jax.Array]
    arrived: Callable[[Carry, jax.Array, Item, jax.Array], Carry]
    poison: bool = False

    @property
    def num_ticks(self) -> int:
        """From the first item to the last one."""
        return self.rounds.num_ticks(self.turns)


def run(
    cycle: Cycle[Carry],
    rank: jax.Array,
    carry: Carry,
    after_turn: Callable[[Carry], tuple[Carry, jax.Array]] | None = None,
) -> Carry:
    """Runs all items, inside `shard_map`.

    Args:
      rank: this device's coordinate on the pipe axis, int32 [].
      after_turn: called by all devices at once after each round: gives the carry, and whether to go on, the same on all
        devices. None goes on to the end.
    """
    period = cycle.rounds.period
    message: Wire = [blank(leaf.shape, leaf.dtype, cycle.poison) for leaf in cycle.wire]
    state = carry, [message for _ in cycle.rounds.ways] or [message], message

    def tick(number: jax.Array, state: Any) -> Any:
        return _tick(cycle, rank, number, state)

    if after_turn is None:
        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(cycle.num_ticks), tick, state)[0]

    def one_turn(looped: Any) -> Any:
        turn, _, state = looped
        end = jnp.minimum((turn + 1) * period, cycle.num_ticks)
        carry, *messages = jax.lax.fori_loop(turn * period, end, tick, state)
        carry, more = after_turn(carry)
        return turn + 1, more & (end < cycle.num_ticks), (carry, *messages)

    start = jnp.int32(0), jnp.bool_(cycle.turns > 0), state
    return jax.lax.while_loop(lambda looped: looped[1], one_turn, start)[2][0]


def _tick(cycle: Cycle[Any], rank: jax.Array, number: jax.Array, state: Any) -> Any:
    carry, inboxes, outbox = state
    rounds = cycle.rounds
    item, there = _item(cycle, number, rank)
    there &= cycle.wanted(carry, item)
    mine = jnp.asarray(cycle.program_ids, jnp.int32)[item.stage]
    inbox = _arrived_for(cycle, item.stage, inboxes)
    turn = jnp.int32(0)
    for program_id, branch in enumerate(cycle.branches):

        def work(changed: Any, inbox: Wire, item: Item, branch: Any = branch) -> Any:
            carry, sent = changed
            carry, made = branch(carry, inbox, item)
            return carry, made or sent

        named = jax.named_scope(scopes.of_op("F", program_id, cycle.program_ids))(with_whole_dims(work))
        wanted = there & (mine == program_id)
        turn, (carry, outbox) = in_turn(turn, wanted, named, (carry, outbox), inbox, item)
    with jax.named_scope(scopes.PERMUTE):
        inboxes = [
            list(outbox) if way.stays else [jax.lax.ppermute(leaf, PIPE, way.edges) for leaf in outbox]
            for way in rounds.ways
        ] or inboxes
    first, last = rounds.placement[0], rounds.placement[-1]
    if first != last:
        done, real = _item(cycle, number, jnp.int32(last))
        real &= done.stage == len(rounds.placement) - 1
        back = cycle.back(carry, done)
        with jax.named_scope(scopes.PERMUTE):
            told = jax.lax.ppermute(back, PIPE, [(last, first)])
        carry = cycle.arrived(carry, told, done, real & (rank == first))
    return carry, inboxes, outbox


def _arrived_for(cycle: Cycle[Any], stage: jax.Array, inboxes: Sequence[Wire]) -> Wire:
    """What has come for a stage, of the ways on which something may have come."""
    if len(inboxes) == 1:
        return inboxes[0]
    way = jnp.asarray(cycle.rounds.way_to, jnp.int32)[stage]
    return [jax.lax.select_n(way, *leaves) for leaves in zip(*inboxes, strict=True)]


def _item(cycle: Cycle[Any], number: jax.Array, rank: jax.Array) -> tuple[Item, jax.Array]:
    """What a rank does in a tick, and whether it does anything."""
    rounds = cycle.rounds
    group = jnp.asarray(rounds.table, jnp.int32)[number % rounds.period, rank]
    kept = jnp.maximum(group, 0)
    since = number - jnp.asarray(rounds.starts, jnp.int32)[kept]  # ticks since the first item of the group
    turn, stage = since // rounds.period, since % rounds.period
    there = (group >= 0) & (since >= 0) & (turn < cycle.turns)
    turn = jnp.clip(turn, 0, max(0, cycle.turns - 1))
    return Item(kept, turn, jnp.minimum(stage, len(rounds.placement) - 1)), there
