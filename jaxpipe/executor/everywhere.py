"""Layers that occur once, and tied ones: stored cut over the ranks, gathered on every rank once per step.

The gradients go the transposed way, and that sums those of tied weights over the stages that use them.
"""

import jax

from jaxpipe.executor.residence import Repeat, Residence
from jaxpipe.mesh import PIPE, pipe_size
from jaxpipe.model.layout import Shared
from jaxpipe.model.placement import Placement
from jaxpipe.model.shapes import is_inexact
from jaxpipe.model.stages import Part
from jaxpipe.types import Avals, Params


class Everywhere(Residence[Shared]):
    """Leaves in the shapes that the layer made, whole on every rank."""

    def avals(self, entry: Shared) -> Avals:
        return entry.params

    def enter(self, entry: Shared, stored: Params) -> Params:
        def gather(leaf: jax.Array, placement: Placement) -> jax.Array:
            dim = placement.dim(PIPE)
            return leaf if dim is None else jax.lax.all_gather(leaf, PIPE, axis=dim, tiled=True)

        return jax.tree.map(gather, stored, entry.placements)

    def take(self, held: Params, part: Part, repeat: Repeat) -> Params:
        return held

    def add(self, sums: jax.Array, part: Part, repeat: Repeat, gradient: jax.Array) -> jax.Array:
        return sums + gradient.astype(sums.dtype)

    def leave(self, entry: Shared, gradients: Params) -> Params:
        ranks = pipe_size(self.mesh)

        def scatter(leaf: jax.Array, placement: Placement) -> jax.Array:
            dim = placement.dim(PIPE)
            if ranks == 1:
                return leaf
            if not is_inexact(leaf):  # no gradient: zeros, like the sums that they come from
                return leaf if dim is None else jax.lax.slice_in_dim(leaf, 0, leaf.shape[dim] // ranks, axis=dim)
            if dim is None:
                return jax.lax.psum(leaf, PIPE)
            return jax.lax.psum_scatter(leaf, PIPE, scatter_dimension=dim, tiled=True)

        return jax.tree.map(scatter, gradients, entry.placements)
