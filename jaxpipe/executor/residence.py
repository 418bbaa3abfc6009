"""`Residence`: how a rank holds some entries of the params tree while a step runs.

Stored params are cut over the ranks, so that weights and optimizer state shrink with their number. What a rank computes
with is made from them once per step (`enter`), read and added to by the ops (`take`, `add`), and turned back into gradients
of what is stored (`leave`). Each way of doing that is a subclass; `executor/weights.py` puts them together.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import jax
from jax.sharding import Mesh

from jaxpipe.layout.entries import Shared, Stack
from jaxpipe.layout.on_mesh import left_to_the_compiler
from jaxpipe.layout.placement import Placement
from jaxpipe.layout.stages import Part
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Params, Tree

Entry = TypeVar("Entry", Stack, Shared)
# Which repetition of a unit: an index, or a traced int32 inside of a scan.
Repeat = Any


class Residence(abc.ABC, Generic[Entry]):
    """How a rank holds some entries.

    Args:
      entries: by name; their `params` are of the dtypes that a step computes with.
      mesh: the devices.
      frozen: by the name of an entry, the numbers of those of its leaves that get no gradient.
    """

    def __init__(self, entries: dict[str, Entry], mesh: Mesh, frozen: Mapping[str, frozenset[int]] | None = None):
        self.entries, self.mesh = entries, mesh
        self.frozen = {name: (frozen or {}).get(name, frozenset()) for name in entries}

    @abc.abstractmethod
    def avals(self) -> Avals:
        """Abstract values of what a rank holds."""

    @abc.abstractmethod
    def trained(self, held: Tree) -> Tree:
        """What a rank holds, with None in the place of what is frozen, as sums of gradients are."""

    @abc.abstractmethod
    def placements(self) -> Sequence[Placement | None]:
        """Per leaf of that, how it lies over further axes of the mesh; None: as the compiler likes."""

    @abc.abstractmethod
    def enter(self, stored: Params, rank: jax.Array) -> Tree:
        """What a rank holds, from its part of what is stored, of which all data ranks have the same; padding is cut off.

        Args:
          stored: the entries by name.
          rank: int32 [].
        """

    @abc.abstractmethod
    def take(self, held: Tree, part: Part, repeat: Repeat) -> Params:
        """The params that repetition `repeat` of a part computes with; a leading dim of `part.count` if that is not 1."""

    @abc.abstractmethod
    def add(self, sums: Tree, part: Part, repeat: Repeat, gradients: Sequence[jax.Array | None]) -> Tree:
        """The gradients of what a rank holds, with those of one repetition added in place.

        Args:
          gradients: of the inexact leaves of what `take` gives that are trained, in order; None adds nothing.
        """

    @abc.abstractmethod
    def leave(self, sums: Tree, rank: jax.Array) -> Params:
        """The transpose of `enter`: from the gradients of what a rank holds to its part of those of what is stored.

        Both have None in the place of what is frozen.
        """


class ByEntry(Residence[Entry]):
    """A residence that holds each entry by itself: leaves in the structure that the layer made, and one dim of each may
    count layers."""

    @abc.abstractmethod
    def held_of(self, entry: Entry) -> Avals:
        """Abstract values of what a rank holds of an entry."""

    @abc.abstractmethod
    def placement_of(self, placement: Placement) -> Placement:
        """How a leaf of that lies, from how one of the layer lies."""

    @abc.abstractmethod
    def enter_one(self, entry: Entry, stored: Params) -> Params:
        """`enter` for one entry."""

    @abc.abstractmethod
    def take_one(self, held: Params, part: Part, repeat: Repeat) -> Params:
        """`take` from what a rank holds of the entry of the part."""

    @abc.abstractmethod
    def add_one(self, sums: jax.Array, part: Part, repeat: Repeat, gradient: jax.Array) -> jax.Array:
        """`add` for one leaf."""

    @abc.abstractmethod
    def leave_one(self, entry: Entry, gradients: Params) -> Params:
        """`leave` for one entry."""

    def avals(self) -> Avals:
        return {name: self.held_of(entry) for name, entry in self.entries.items()}

    def placements(self) -> Sequence[Placement | None]:
        tree = {name: entry.placements for name, entry in self.entries.items()}
        found = [left_to_the_compiler(self.placement_of(placement)) for placement in jax.tree.leaves(tree)]
        return [placement if placement.cuts else None for placement in found]

    def trained(self, held: Tree) -> Tree:
        return {name: self._trained(name, held[name]) for name in self.entries}

    def _trained(self, name: str, tree: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, [None if i in self.frozen[name] else a for i, a in enumerate(leaves)])

    def enter(self, stored: Params, rank: jax.Array) -> Tree:
        return {name: self.enter_one(entry, stored[name]) for name, entry in self.entries.items()}

    def take(self, held: Tree, part: Part, repeat: Repeat) -> Params:
        return self.take_one(held[_name(part)], part, repeat)

    def add(self, sums: Tree, part: Part, repeat: Repeat, gradients: Sequence[jax.Array | None]) -> Tree:
        old, rebuild = split_inexact(sums[_name(part)])
        pairs = zip(old, gradients, strict=True)
        return {**sums, _name(part): rebuild([s if g is None else self.add_one(s, part, repeat, g) for s, g in pairs])}

    def leave(self, sums: Tree, rank: jax.Array) -> Params:
        def one(name: str, entry: Entry) -> Params:
            params, placements = (self._trained(name, tree) for tree in (entry.params, entry.placements))
            return self.leave_one(replace(entry, params=params, placements=placements), sums[name])

        return {name: one(name, entry) for name, entry in self.entries.items()}


def _name(part: Part) -> str:
    assert part.address is not None, "a part without weights has no residence"
    return part.address.name
