"""The entries of the params tree: stacks of like layers, and layers that are stored on their own."""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpipe.layout.placement import Placement
from jaxpipe.mesh import PIPE
from jaxpipe.types import Avals, Params, Tree


@dataclass(frozen=True)
class Stack:
    """Layers of one kind.

    Attributes:
      places: `places[layer] = (rank, slot)`.
      params: the shapes of one layer's params, as the layer made them.
      placements: of these, the dims counted as in the layer. The stack is cut over the ranks besides.
    """

    name: str
    slots: int
    places: dict[int, tuple[int, int]]
    params: Params
    placements: Tree = field(repr=False)

    @property
    def stored(self) -> Avals:
        """The shapes of what a slot holds: those of `params`, with the dims that are padded longer."""
        return _stored(self.params, self.placements)


@dataclass(frozen=True)
class Shared:
    """A layer that is stored on its own, the shapes that it made, and the `Placement` of each of its leaves."""

    name: str
    layer: int
    params: Avals
    placements: Tree = field(repr=False)

    @property
    def stored(self) -> Avals:
        """The shapes of what is stored: those of `params`, with the dims that are padded longer."""
        return _stored(self.params, self.placements)


@dataclass(frozen=True)
class Pile:
    """Layers of one kind that are stored one by one and are a stack during a step, on the ranks that use them.

    Attributes:
      places: `places[layer] = (rank, slot)`.
      stored_as: `stored_as[layer]` is the name of its own entry.
    """

    name: str
    places: dict[int, tuple[int, int]]
    stored_as: dict[int, str]


def _stored(params: Avals, placements: Tree) -> Avals:
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(place.stored(a.shape), a.dtype), params, placements)


def in_stack(placement: Placement) -> Placement:
    """The placement of a stack [S, slots, ...] of arrays that are placed so."""
    return placement.behind(2, (PIPE, 0))


def common(names: Sequence[str]) -> str:
    """One name for layers that have their own: `block` for `block_0`, `block_1`; the first one's if they share nothing."""
    if len(set(names)) == 1:
        return names[0]
    return os.path.commonprefix(list(names)).rstrip("0123456789_-.:/ ") or names[0]


def unique(name: str, taken: dict[str, Any]) -> str:
    """The name, with a number if it is taken."""
    if name not in taken:
        return name
    return next(f"{name}_{n}" for n in range(2, len(taken) + 3) if f"{name}_{n}" not in taken)
