"""Where on its rank each array lies that belongs to layers of a few ranks. Shapes only.

All ranks run one program, so what a rank holds of its own has the same arrays on every rank: *rooms*, in which a rank has
layers whose arrays have that shape, and per dtype one *vector*, in which a rank has its other arrays end to end.
`rooms.with_rooms` says which gets what.

An embedding [V, D] on the first rank and a head [D, V] on the last one have a room together, too. How, depends on memory.
The arrays of a TPU lie in tiles of their last two dims, and in any order of the dims: there one of them lies transposed in
the room, which costs a layout and no copy, as long as no two loops want the room in two layouts: so tails read another
operand than forwards (`Twice`), and gradients are added in the order of the room's dims (`Owned`). Elsewhere numbers lie
in a row: there the room is a vector of its own, which is read as [V, D] or as [D, V], and a transposed array would be
copied by each product.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jaxpipe.executor.rooms import with_rooms
from jaxpipe.types import Shape

# Arrays of fewer elements always lie in the vector: an array of the program for each of them would cost more than a copy.
SMALL = 1 << 12
# Where large arrays begin in a vector is a multiple of this: whole rows of the tiles of a TPU.
ALIGNED = 128


@dataclass(frozen=True)
class Leaf:
    """One array of a layer, or of each of several like layers.

    Attributes:
      name, index: of the layers, and the number of the array among those of a layer.
      members: by rank, the entries of the params tree that it stands for, one per slot.
      shape: as a layer made it.
      stored: as it is stored, whole: some dims may be longer.
      cut: the dim that is cut over the ranks in storage, or None: then every rank stores all of it.
      dtype: that it is computed with; `itemsize` are the bytes of a number.
      frozen: whether it gets no gradient.
    """

    name: str
    index: int
    members: tuple[tuple[int, tuple[str, ...]], ...]
    shape: Shape
    stored: Shape
    cut: int | None
    dtype: str
    itemsize: int
    frozen: bool = False

    @property
    def ranks(self) -> list[int]:
        """Which ranks use it."""
        return [rank for rank, _ in self.members]

    def entries(self, rank: int) -> tuple[str, ...]:
        """The entries of a rank, one per slot."""
        return dict(self.members).get(rank, ())

    @property
    def slots(self) -> int:
        """How many layers the rank with most has."""
        return max(len(entries) for _, entries in self.members)

    @property
    def one(self) -> int:
        """How many numbers a layer has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """How many numbers lie on each of its ranks."""
        return self.slots * self.one

    def piece(self, ranks: int) -> Shape:
        """The shape of what a rank stores of a layer."""
        return tuple(n // ranks if dim == self.cut else n for dim, n in enumerate(self.stored))

    def dims(self) -> list[tuple[int, int, bool]]:
        """What must be alike in arrays that share a room: of each dim its size, that in storage, and whether it is cut."""
        pairs = zip(self.shape, self.stored, strict=True)
        return [(made, stored, dim == self.cut) for dim, (made, stored) in enumerate(pairs)]


@dataclass(frozen=True)
class Room:
    """An array [slots, ...] of the program.

    Attributes:
      tenants: what lies in it, no two on one rank.
      orders: of each tenant, which of its dims is dim 0, 1, ... of the room.
    """

    tenants: tuple[Leaf, ...]
    orders: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tenants: Sequence[Leaf]) -> "Room":
        """A room of the shape that the first tenant has."""
        return cls(tuple(tenants), tuple(_order(tenants[0], leaf) for leaf in tenants))

    @property
    def slots(self) -> int:
        return max(leaf.slots for leaf in self.tenants)

    def on(self, rank: int) -> tuple[Leaf, tuple[int, ...]] | None:
        """The tenant that a rank has, and the order of its dims."""
        pairs = zip(self.tenants, self.orders, strict=True)
        return next(((leaf, order) for leaf, order in pairs if rank in leaf.ranks), None)


@dataclass
class Vector:
    """What lies end to end: all arrays of one dtype that have no room.

    Attributes:
      starts: each array, and the index of its first number on all of its ranks.
    """

    dtype: str
    starts: list[tuple[Leaf, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """As long as the fullest rank needs."""
        return max((start + leaf.size for leaf, start in self.starts), default=0)

    @property
    def is_one_array(self) -> bool:
        """Whether a rank that fills it has one array alone: what is read whole need not be cut out, which is a copy."""
        return any(leaf.one == self.length for leaf, _ in self.starts)

    def on(self, rank: int) -> list[tuple[Leaf, int]]:
        """What a rank has, in order."""
        return sorted(((leaf, at) for leaf, at in self.starts if rank in leaf.ranks), key=lambda pair: pair[1])

    def add(self, leaf: Leaf) -> None:
        """Puts an array behind all that its ranks have."""
        start = max((at + held.size for rank in leaf.ranks for held, at in self.on(rank)), default=0)
        if leaf.one >= SMALL:
            start = -(-start // ALIGNED) * ALIGNED
        self.starts.append((leaf, start))


class Places:
    """The rooms and vectors of some arrays.

    Args:
      tiled: whether memory has tiles, as that of a TPU.

    Attributes:
      rooms, vectors: by name.
    """

    def __init__(self, leaves: Iterable[Leaf], tiled: bool):
        self.rooms: dict[str, Room] = {}
        self.vectors: dict[str, Vector] = {}
        # What is frozen lies apart, because there are no sums of gradients of it.
        kinds: dict[tuple[str, bool], list[Leaf]] = {}
        for leaf in leaves:
            kinds.setdefault((leaf.dtype, leaf.frozen), []).append(leaf)
        for kind in sorted(kinds):
            self._place(kinds[kind], tiled)

    def _place(self, leaves: Sequence[Leaf], tiled: bool) -> None:
        large = [leaf for leaf in leaves if leaf.one >= SMALL and leaf.cut is not None]
        candidates = _together(large, tiled)
        sizes = [_sizes(tenants) for tenants in candidates]
        small = _sizes(leaf for leaf in leaves if leaf not in large)
        housed: set[Leaf] = set()
        for tenants, gets in zip(candidates, with_rooms(sizes, small), strict=True):
            if gets:
                self._add_room(tenants, tiled)
                housed |= set(tenants)
        # What several ranks have leaves no gaps if it comes first; and what is aligned comes before what is not.
        rest = sorted((leaf for leaf in leaves if leaf not in housed), key=lambda leaf: (-len(leaf.ranks), -leaf.size))
        vector = Vector(leaves[0].dtype)
        for leaf in (leaf for leaf in rest if leaf.one >= SMALL):
            vector.add(leaf)
        small = _sizes(leaf for leaf in rest if leaf.one < SMALL)
        # What tiles hold is no row of numbers, so a TPU copies what it reads of a vector in any case.
        apart = not tiled and vector.is_one_array and max(small.values(), default=0) <= vector.length // 100
        for leaf in rest:
            kind = "small arrays" if apart and leaf.one < SMALL else "vector"
            name = f"{kind}: {leaf.dtype}{', frozen' * leaf.frozen}"
            self.vectors.setdefault(name, Vector(leaf.dtype)).add(leaf)

    def _add_room(self, tenants: Sequence[Leaf], tiled: bool) -> None:
        first = tenants[0]
        name = f"room {len(self.rooms) + len(self.vectors)}: {first.dtype}{list(first.shape)}"
        if tiled or all(leaf.dims() == first.dims() for leaf in tenants):
            self.rooms[name] = Room.of(tenants)
        else:
            self.vectors[name] = Vector(first.dtype, [(leaf, 0) for leaf in tenants])


def _sizes(leaves: Iterable[Leaf]) -> dict[int, int]:
    """How many numbers each rank has of some arrays."""
    found: dict[int, int] = {}
    for leaf in leaves:
        for rank in leaf.ranks:
            found[rank] = found.get(rank, 0) + leaf.size
    return found


def _together(leaves: Sequence[Leaf], tiled: bool) -> list[list[Leaf]]:
    """What may share a room, no two arrays of one rank: arrays of the same dims, and then those of dims that do as well."""

    def exactly(a: Leaf, b: Leaf) -> bool:
        return a.dims() == b.dims()

    def nearly(a: Leaf, b: Leaf) -> bool:
        return sorted(a.dims()) == sorted(b.dims()) if tiled else a.one == b.one

    found: list[list[Leaf]] = []
    for leaf in sorted(leaves, key=lambda leaf: -leaf.size):
        free = [group for group in found if not {rank for held in group for rank in held.ranks} & set(leaf.ranks)]
        fits = [group for like in (exactly, nearly) for group in free if like(group[0], leaf)]
        if fits:
            fits[0].append(leaf)
        else:
            found.append([leaf])
    return found


def _order(first: Leaf, leaf: Leaf) -> tuple[int, ...]:
    """Per dim of the first array, the dim of another one that is like it; the same dims wherever that is possible."""
    wanted, dims = first.dims(), leaf.dims()
    if wanted == dims:
        return tuple(range(len(dims)))
    free = list(range(len(dims)))
    found: list[int] = []
    for dim in wanted:
        at = next(i for i in free if dims[i] == dim)
        free.remove(at)
        found.append(at)
    return tuple(found)
