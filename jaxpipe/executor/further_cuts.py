"""Keeps what a rank holds cut over the further axes of the mesh, which are left to the compiler inside of the loop.

The compiler takes the cuts of weights from where they are stored, and finds those of everything that is computed from them.
But it has to be told about what starts from nothing, as sums of gradients do, and about results: without a word it keeps
those of shared layers whole on each device.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxpipe.layout.layout import Layout
from jaxpipe.layout.on_mesh import left_to_the_compiler, parts_of
from jaxpipe.layout.placement import Placement
from jaxpipe.mesh import further_axes
from jaxpipe.parallel import constrain
from jaxpipe.types import Avals, Params, Tree


class FurtherCuts:
    """The cuts of one layout on a mesh. Without further axes of several devices nothing is added to a program.

    Args:
      held: per leaf of what a rank holds, how it lies over further axes; None: as the compiler likes.
    """

    def __init__(self, layout: Layout, mesh: Mesh, held: Sequence[Placement | None]):
        self._sizes, self._held = mesh.shape, list(held)
        self._there = any(size > 1 for size in further_axes(mesh).values())
        self._stored = [left_to_the_compiler(p) for p in jax.tree.leaves(layout.placements)]

    def held(self, tree: Tree) -> Tree:
        """The same arrays, of what a rank holds: [slots, ...] in stacks."""
        return self._constrained(tree, self._held)

    def stored(self, tree: Params) -> Params:
        """The same arrays, of a rank's part of what is stored: [1, slots, ...] in stacks."""
        return self._constrained(tree, self._stored)

    def bytes_on_a_device(self, held: Avals) -> int:
        """The bytes that a device has of arrays that a rank holds."""
        pairs = zip(jax.tree.leaves(held, is_leaf=_is_none), self._held, strict=True)
        return sum(
            math.prod(a.shape) * a.dtype.itemsize // parts_of(place or Placement(), self._sizes)
            for a, place in pairs
            if a is not None
        )

    def _constrained(self, tree: Tree, placements: Sequence[Placement | None]) -> Tree:
        if not self._there:
            return tree
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_none)
        pairs = zip(leaves, placements, strict=True)
        found = [a if place is None or a is None else constrain(a, place.spec) for a, place in pairs]
        return jax.tree.unflatten(structure, found)


def _is_none(leaf: object) -> bool:
    """Gradients have None in the place of what is frozen."""
    return leaf is None
