"""Layers whose weights several ranks use: stored cut over the ranks, gathered on every rank once per step.

The gradients go the transposed way, and that sums those of tied weights over the stages that use them. A layer that only
one rank uses is `Owned`, unless what a further axis cuts would have to lie end to end with other arrays there.
"""

import jax

from jaxpipe.executor import along
from jaxpipe.executor.residence import ByEntry, Repeat
from jaxpipe.layout.entries import Shared
from jaxpipe.layout.placement import Placement, fit
from jaxpipe.layout.stages import Part
from jaxpipe.mesh import PIPE, pipe_size
from jaxpipe.model.shapes import is_inexact
from jaxpipe.types import Avals, Params


class Everywhere(ByEntry[Shared]):
    """Leaves in the shapes that the layer made, whole on every rank."""

    def held_of(self, entry: Shared) -> Avals:
        return entry.params

    def placement_of(self, placement: Placement) -> Placement:
        return placement

    def enter_one(self, entry: Shared, stored: Params) -> Params:
        def gather(leaf: jax.Array, placement: Placement, made: jax.ShapeDtypeStruct) -> jax.Array:
            whole = leaf if placement.dim(PIPE) is None else along.gathered(leaf, PIPE, placement)
            return fit(whole, made.shape)

        return jax.tree.map(gather, stored, entry.placements, entry.params)

    def take_one(self, held: Params, part: Part, repeat: Repeat) -> Params:
        return held

    def add_one(self, sums: jax.Array, part: Part, repeat: Repeat, gradient: jax.Array) -> jax.Array:
        return sums + gradient.astype(sums.dtype)

    def leave_one(self, entry: Shared, gradients: Params) -> Params:
        ranks = pipe_size(self.mesh)

        def scatter(leaf: jax.Array, placement: Placement, kept: jax.ShapeDtypeStruct) -> jax.Array:
            dim, leaf = placement.dim(PIPE), fit(leaf, kept.shape)
            if ranks == 1:
                return leaf
            if not is_inexact(leaf):  # no gradient: zeros, like the sums that they come from
                return leaf if dim is None else jax.lax.slice_in_dim(leaf, 0, leaf.shape[dim] // ranks, axis=dim)
            if dim is None:
                return jax.lax.psum(leaf, PIPE)
            return along.scattered(leaf, PIPE, placement)

        return jax.tree.map(scatter, gradients, entry.placements, entry.stored)
