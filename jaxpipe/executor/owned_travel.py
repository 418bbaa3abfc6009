"""Brings arrays that are stored cut over the ranks to the ranks that use them, and their gradients back; in `shard_map`.

Each rank has a piece of every array. Before the loop it sends to each rank the pieces of what that rank uses, by an
`all_to_all` per room and one per vector, and behind the loop the gradients go the other way. Nothing is summed, because
nobody else has gradients of them. Only what is not cut, and so lies in storage on every rank, is brought to all ranks by a
sum with zeros: small arrays.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxpipe.executor.data_cut import apart, joined
from jaxpipe.executor.owned_places import Leaf, Room, Vector
from jaxpipe.layout.placement import fit
from jaxpipe.mesh import PIPE
from jaxpipe.model.shapes import is_inexact

# A rank's piece of the array number `index` of the entry `name`.
Pieces = dict[tuple[str, int], jax.Array]


def into_room(room: Room, pieces: Pieces, ranks: int) -> jax.Array:
    """What this rank has in a room: [slots, ...]."""
    first = room.tenants[0]
    empty = jnp.zeros(first.piece(ranks), first.dtype)

    def row(rank: int) -> jax.Array:
        leaf, order = room.on(rank) or (first, ())
        mine = [pieces[name, leaf.index].transpose(order) for name in leaf.entries(rank)]
        return jnp.stack([*mine, *[empty] * (room.slots - len(mine))])

    assert first.cut is not None, "what has a room is cut"
    arrived = _exchanged(jnp.stack([row(rank) for rank in range(ranks)]))
    return fit(joined(arrived, 1 + first.cut), (room.slots, *first.shape))


def out_of_room(room: Room, sums: jax.Array, ranks: int) -> Pieces:
    """The pieces of gradients, from what each rank has in a room."""
    first = room.tenants[0]
    assert first.cut is not None, "what has a room is cut"
    if is_inexact(sums):
        arrived = _exchanged(apart(fit(sums, (room.slots, *first.stored)), 1 + first.cut, ranks))
    else:  # no gradient: zeros
        arrived = jnp.zeros((ranks, room.slots, *first.piece(ranks)), sums.dtype)
    return {
        (name, leaf.index): arrived[rank, slot].transpose(back_from(order))
        for leaf, order in zip(room.tenants, room.orders, strict=True)
        for rank in leaf.ranks
        for slot, name in enumerate(leaf.entries(rank))
    }


def into_vector(vector: Vector, pieces: Pieces, ranks: int, rank: jax.Array) -> jax.Array:
    """What this rank has in a vector."""
    length = _sent(vector, ranks)

    def row(rank: int) -> jax.Array:
        cut = [pieces[name, leaf.index].ravel() for leaf, name in _arrays(vector, rank) if leaf.cut is not None]
        return _end_to_end(cut, length, vector.dtype)

    arrived = jnp.zeros((ranks, 0), vector.dtype)
    if length:
        arrived = _exchanged(jnp.stack([row(rank) for rank in range(ranks)]))

    def on_rank(mine: int) -> Callable[[jax.Array], jax.Array]:
        def assembled(arrived: jax.Array) -> jax.Array:
            # One after the other into the vector: put side by side, all arrays would lie there twice for a moment.
            found, at = jnp.zeros(vector.length, vector.dtype), 0
            for leaf, start in vector.on(mine):
                for slot, name in enumerate(leaf.entries(mine)):
                    if leaf.cut is None:
                        whole = pieces[name, leaf.index]
                    else:
                        shape = leaf.piece(ranks)
                        whole = arrived[:, at : at + math.prod(shape)].reshape(ranks, *shape)
                        whole = joined(whole, leaf.cut)
                        at += math.prod(shape)
                    whole = fit(whole, leaf.shape).ravel()
                    found = jax.lax.dynamic_update_slice(found, whole, (start + slot * leaf.one,))
            return found

        return assembled

    return jax.lax.switch(rank, [on_rank(mine) for mine in range(ranks)], arrived)


def out_of_vector(vector: Vector, sums: jax.Array, ranks: int, rank: jax.Array) -> Pieces:
    """The pieces of gradients, from what each rank has in a vector."""
    every = [(leaf, name) for mine in range(ranks) for leaf, name in _arrays(vector, mine)]
    if not is_inexact(sums):  # no gradient: zeros
        return {(name, leaf.index): jnp.zeros(leaf.piece(ranks), sums.dtype) for leaf, name in every}
    length = _sent(vector, ranks)

    def on_rank(mine: int) -> Callable[[jax.Array], tuple[jax.Array, list[jax.Array]]]:
        def taken_apart(sums: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            whole: dict[tuple[str, int], jax.Array] = {}
            rows, at = jnp.zeros((ranks, length), sums.dtype), 0
            for leaf, start in vector.on(mine):
                for slot, name in enumerate(leaf.entries(mine)):
                    first = start + slot * leaf.one
                    one = fit(sums[first : first + leaf.one].reshape(leaf.shape), leaf.stored)
                    if leaf.cut is None:
                        whole[name, leaf.index] = one
                    else:
                        row = apart(one, leaf.cut, ranks).reshape(ranks, -1)
                        rows = jax.lax.dynamic_update_slice(rows, row, (0, at))
                        at += row.shape[1]
            uncut = [(leaf, whole.get((name, leaf.index))) for leaf, name in every if leaf.cut is None]
            return rows, [jnp.zeros(leaf.stored, sums.dtype) if a is None else a for leaf, a in uncut]

        return taken_apart

    sent, uncut = jax.lax.switch(rank, [on_rank(mine) for mine in range(ranks)], sums)
    totals = iter(jax.lax.psum(uncut, PIPE) if uncut else [])
    found = {(name, leaf.index): next(totals) for leaf, name in every if leaf.cut is None}
    arrived = _exchanged(sent) if length else sent
    for owner in range(ranks):
        at = 0
        for leaf, name in _arrays(vector, owner):
            if leaf.cut is not None:
                shape = leaf.piece(ranks)
                found[name, leaf.index] = arrived[owner, at : at + math.prod(shape)].reshape(shape)
                at += math.prod(shape)
    return found


def back_from(order: Sequence[int]) -> tuple[int, ...]:
    """The inverse of an order of dims."""
    return tuple(order.index(dim) for dim in range(len(order)))


def _arrays(vector: Vector, rank: int) -> list[tuple[Leaf, str]]:
    """Each array that a rank has in a vector, with the entry that it is of, in order."""
    return [(leaf, name) for leaf, _ in vector.on(rank) for name in leaf.entries(rank)]


def _sent(vector: Vector, ranks: int) -> int:
    """How many numbers a rank sends to the one that uses most."""
    sizes = [
        [math.prod(leaf.piece(ranks)) for leaf, _ in _arrays(vector, r) if leaf.cut is not None] for r in range(ranks)
    ]
    return max(map(sum, sizes))


def _exchanged(rows: jax.Array) -> jax.Array:
    """[S, ...], a row for each rank -> [S, ...], the row that each rank has for this one."""
    return jax.lax.all_to_all(rows, PIPE, 0, 0, tiled=True)


def _end_to_end(arrays: Sequence[jax.Array], length: int, dtype: str) -> jax.Array:
    return jnp.concatenate([*arrays, jnp.zeros(length - sum(a.size for a in arrays), dtype)])
