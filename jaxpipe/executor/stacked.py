"""Like layers: a rank computes with its own row of each stack, as it is stored. Nothing moves."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.executor.residence import Repeat, Residence
from jaxpipe.model.layout import Stack
from jaxpipe.model.stages import Part
from jaxpipe.types import Avals, Params


class Stacked(Residence[Stack]):
    """Leaves [slots, ...] on each rank."""

    def avals(self, entry: Stack) -> Avals:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((entry.slots, *a.shape), a.dtype), entry.params)

    def enter(self, entry: Stack, stored: Params) -> Params:
        return jax.tree.map(lambda a: a[0], stored)

    def take(self, held: Params, part: Part, repeat: Repeat) -> Params:
        at = part.slot + repeat * part.count
        if part.count == 1:
            return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), held)
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, part.count), held)

    def add(self, sums: jax.Array, part: Part, repeat: Repeat, gradient: jax.Array) -> jax.Array:
        at = part.slot + repeat * part.count
        index: Any = at if part.count == 1 else at + jnp.arange(part.count, dtype=jnp.int32)
        return sums.at[index].add(gradient.astype(sums.dtype))

    def leave(self, entry: Stack, gradients: Params) -> Params:
        return jax.tree.map(lambda a: a[None], gradients)
