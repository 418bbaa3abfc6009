"""Like layers: a rank computes with its own row of each stack, as it is stored. Nothing moves over the ranks."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.executor.residence import ByEntry, Repeat
from jaxpipe.layout.entries import Stack
from jaxpipe.layout.placement import Placement, fit
from jaxpipe.layout.stages import Part
from jaxpipe.types import Avals, Params


class Stacked(ByEntry[Stack]):
    """Leaves [slots, ...] on each rank."""

    def held_of(self, entry: Stack) -> Avals:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((entry.slots, *a.shape), a.dtype), entry.params)

    def placement_of(self, placement: Placement) -> Placement:
        return placement.behind(1)

    def enter_one(self, entry: Stack, stored: Params) -> Params:
        return jax.tree.map(lambda a, made: fit(a[0], (entry.slots, *made.shape)), stored, entry.params)

    def take_one(self, held: Params, part: Part, repeat: Repeat) -> Params:
        at = part.slot + repeat * part.count
        if part.count == 1:
            return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), held)
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, part.count), held)

    def add_one(self, sums: jax.Array, part: Part, repeat: Repeat, gradient: jax.Array) -> jax.Array:
        at = part.slot + repeat * part.count
        index: Any = at if part.count == 1 else at + jnp.arange(part.count, dtype=jnp.int32)
        return sums.at[index].add(gradient.astype(sums.dtype))

    def leave_one(self, entry: Stack, gradients: Params) -> Params:
        return jax.tree.map(lambda a, kept: fit(a, (entry.slots, *kept.shape))[None], gradients, entry.stored)
