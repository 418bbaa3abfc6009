"""Layers that one rank uses, and piles: stored cut over the ranks, and brought to the ranks that use them once per step.

So that a rank holds the weights and gradients of its own layers and no others. `owned_places` says where each array lies,
`owned_travel` brings it there and its gradients back; what is here reads and adds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.executor.owned_places import Leaf, Places
from jaxpipe.executor.owned_travel import Pieces, back_from, into_room, into_vector, out_of_room, out_of_vector
from jaxpipe.executor.residence import Repeat, Residence
from jaxpipe.layout.entries import Pile, Shared
from jaxpipe.layout.layout import PILED, SHARED, Address
from jaxpipe.layout.placement import Placement
from jaxpipe.layout.stages import Part
from jaxpipe.mesh import PIPE, further_axes, on_tpu, pipe_size
from jaxpipe.model.shapes import is_inexact
from jaxpipe.parallel import constrain
from jaxpipe.types import Avals, Params, Tree


class Owned(Residence[Shared]):
    """Rooms and vectors by name, as `Places` has them.

    Args:
      entries: by name, of the dtypes that a step computes with; none is cut over a further axis.
      mesh: the devices, with several ranks.
      owners: by name, the rank that uses an entry; for those in no pile.
      piles: which of the entries are stacks during a step.
      frozen: as for every residence; the same for all layers of a pile.
    """

    def __init__(
        self,
        entries: dict[str, Shared],
        mesh: Mesh,
        owners: Mapping[str, int],
        piles: Mapping[str, Pile] | None = None,
        frozen: Mapping[str, frozenset[int]] | None = None,
    ):
        super().__init__(entries, mesh, frozen)
        self.ranks = pipe_size(mesh)
        self._cut_further = any(size > 1 for size in further_axes(mesh).values())
        self._leaves = {Address(SHARED, name): self._of(name, {rank: [name]}) for name, rank in owners.items()}
        for pile in (piles or {}).values():
            members: dict[int, list[str]] = {}
            for layer, (rank, _) in sorted(pile.places.items()):
                members.setdefault(rank, []).append(pile.stored_as[layer])
            self._leaves[Address(PILED, pile.name)] = self._of(pile.name, members)
        self.places = Places((leaf for leaves in self._leaves.values() for leaf in leaves), on_tpu(mesh))
        self._rooms = {
            leaf: (name, order)
            for name, room in self.places.rooms.items()
            for leaf, order in zip(room.tenants, room.orders, strict=True)
        }
        # Else XLA would lay out the sums for each of two tenants in turn, and copy them in every tick.
        on_chip = on_tpu(mesh)
        self._turned = {name for name, room in self.places.rooms.items() if on_chip and len(set(room.orders)) > 1}
        self._starts = {leaf: (name, at) for name, v in self.places.vectors.items() for leaf, at in v.starts}

    def _of(self, name: str, members: Mapping[int, Sequence[str]]) -> list[Leaf]:
        """The arrays of like layers; `members` are, by rank, the names of their entries."""
        held = tuple((rank, tuple(names)) for rank, names in sorted(members.items()))
        first = held[0][1][0]
        entry, frozen = self.entries[first], self.frozen[first]
        made, stored, placed = (jax.tree.leaves(tree) for tree in (entry.params, entry.stored, entry.placements))
        return [
            Leaf(name, i, held, a.shape, b.shape, place.dim(PIPE), str(a.dtype), a.dtype.itemsize, i in frozen)
            for i, (a, b, place) in enumerate(zip(made, stored, placed, strict=True))
        ]

    def has(self, address: Address) -> bool:
        """Whether the layers at an address are among these."""
        return address in self._leaves

    def avals(self) -> Avals:
        rooms = {
            name: _aval((room.slots, *room.tenants[0].shape), room.tenants[0].dtype)
            for name, room in self.places.rooms.items()
        }
        return rooms | {name: _aval((v.length,), v.dtype) for name, v in self.places.vectors.items()}

    def trained(self, held: Tree) -> Tree:
        frozen = {self._where(leaf) for leaves in self._leaves.values() for leaf in leaves if leaf.frozen}
        return {name: None if name in frozen else array for name, array in held.items()}

    def _where(self, leaf: Leaf) -> str:
        """The name of the room or vector that an array lies in."""
        return self._rooms[leaf][0] if leaf in self._rooms else self._starts[leaf][0]

    def placements(self) -> Sequence[Placement | None]:
        # Whole along further axes: cut anywhere else than between two arrays, a vector would be permuted in every op.
        return [Placement()] * len(self.avals())

    def enter(self, stored: Params, rank: jax.Array) -> Tree:
        pieces: Pieces = {
            (name, index): leaf for name, tree in stored.items() for index, leaf in enumerate(jax.tree.leaves(tree))
        }
        rooms = {name: into_room(room, pieces, self.ranks) for name, room in self.places.rooms.items()}
        return rooms | {name: into_vector(v, pieces, self.ranks, rank) for name, v in self.places.vectors.items()}

    def leave(self, sums: Tree, rank: jax.Array) -> Params:
        pieces: Pieces = {}
        for name, room in self.places.rooms.items():
            if sums[name] is not None:
                pieces |= out_of_room(room, sums[name], self.ranks)
        for name, vector in self.places.vectors.items():
            if sums[name] is not None:
                pieces |= out_of_vector(vector, sums[name], self.ranks, rank)

        def of(name: str, entry: Shared) -> Params:
            leaves, structure = jax.tree.flatten(entry.params)
            return jax.tree.unflatten(structure, [pieces.get((name, index)) for index in range(len(leaves))])

        return {name: of(name, entry) for name, entry in self.entries.items()}

    def take(self, held: Tree, part: Part, repeat: Repeat) -> Params:
        assert part.address is not None
        leaves = self._leaves[part.address]
        structure = jax.tree.structure(self.entries[leaves[0].members[0][1][0]].params)
        return jax.tree.unflatten(structure, [self._read(held, leaf, part, repeat) for leaf in leaves])

    def add(self, sums: Tree, part: Part, repeat: Repeat, gradients: Sequence[jax.Array | None]) -> Tree:
        assert part.address is not None
        sums, given = dict(sums), iter(gradients)
        for leaf in self._leaves[part.address]:
            name = self._where(leaf)
            if sums[name] is not None and is_inexact(sums[name]):
                if (gradient := next(given)) is not None:
                    sums[name] = self._added(sums[name], leaf, part, repeat, gradient.astype(sums[name].dtype))
        assert not list(given), "one gradient for each leaf that is trained"
        return sums

    def _read(self, held: Tree, leaf: Leaf, part: Part, repeat: Repeat) -> jax.Array:
        at = part.slot + repeat * part.count
        if leaf in self._rooms:
            name, order = self._rooms[leaf]
            found = _sliced(held[name], at, part.count).transpose(_behind(back_from(order)))
        else:
            name, start = self._starts[leaf]
            found = _sliced(held[name], start + at * leaf.one, part.count * leaf.one)
        return found.reshape(leaf.shape if part.count == 1 else (part.count, *leaf.shape))

    def _added(self, sums: jax.Array, leaf: Leaf, part: Part, repeat: Repeat, gradient: jax.Array) -> jax.Array:
        at = part.slot + repeat * part.count
        if leaf in self._rooms:
            name, order = self._rooms[leaf]
            gradient = gradient.reshape(part.count, *leaf.shape).transpose(_behind(order))
            if name in self._turned:
                gradient = with_layout_constraint(gradient, Layout(tuple(range(gradient.ndim))))
        else:
            if self._cut_further:
                gradient = constrain(gradient, PartitionSpec())
            at, gradient = self._starts[leaf][1] + at * leaf.one, gradient.ravel()
        before = _sliced(sums, at, gradient.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(sums, before + gradient, at, 0)


def _sliced(array: jax.Array, at: Any, count: int) -> jax.Array:
    if isinstance(at, int):
        return jax.lax.slice_in_dim(array, at, at + count)
    return jax.lax.dynamic_slice_in_dim(array, at, count)


def _behind(order: Sequence[int]) -> tuple[int, ...]:
    """An order of dims with one more dim in front."""
    return (0, *(dim + 1 for dim in order))


def _aval(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
