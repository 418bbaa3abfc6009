"""Layers that take one position at a time while tokens are generated, as those of flax do, given many positions at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.model.layer_out import LayerOut
from jaxpipe.types import Tree


def one_by_one(step: Callable[[Tree, Tree], tuple[Tree, Tree]], cache: Tree, x: Tree) -> tuple[Tree, Tree]:
    """Runs `step(cache, x) -> (y, cache)` on each position of a chunk, one after the other.

    Args:
      x: leaves [B, n, ...]; n is dim 1 of the first leaf, and leaves without it are given to each step as they are.

    Returns:
      (y, cache), y with leaves [B, n, ...]; leaves of y that have no dim 1 of one position are those of the last step.
    """
    leaves, structure = jax.tree.flatten(x)
    length = leaves[0].shape[1]
    if length == 1:
        return _plain(*step(cache, x))
    along = [leaf.ndim > 1 and leaf.shape[1] == length for leaf in leaves]
    moved = [jnp.moveaxis(leaf, 1, 0) for leaf, there in zip(leaves, along, strict=True) if there]

    def one(cache: Tree, now: list[jax.Array]) -> tuple[Tree, Tree]:
        given = iter(now)
        parts = [next(given)[:, None] if there else leaf for leaf, there in zip(leaves, along, strict=True)]
        y, cache = _plain(*step(cache, jax.tree.unflatten(structure, parts)))
        return cache, y

    cache, ys = jax.lax.scan(one, cache, moved)

    def joined(leaf: Any) -> jax.Array:
        if leaf.ndim > 2 and leaf.shape[2] == 1:
            return jnp.moveaxis(leaf[:, :, 0], 0, 1)
        return leaf[-1]

    return jax.tree.map(joined, ys), cache


def _plain(y: Any, cache: Tree) -> tuple[Tree, Tree]:
    """Without extra losses and metrics, which are of no use while tokens are generated."""
    return (y.y if isinstance(y, LayerOut) else y), cache


def with_length(x: Tree, length: int) -> Tree:
    """Abstract values of the same input with so many positions."""
    chunk = jax.tree.leaves(x)[0].shape[1]

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        along = leaf.ndim > 1 and leaf.shape[1] == chunk
        shape = (leaf.shape[0], length, *leaf.shape[2:]) if along else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(one, x)
