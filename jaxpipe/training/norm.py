"""The norm of a gradient, right for every float it may hold."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.model.shapes import is_inexact, sum_dtype

# Below this, squares of entries that matter may have been flushed to zero: of 1e9 entries whose squares vanish in float32
# (those below 1e-19), all together are worth 1e-29.
SMALLEST_SUM = 1e-20


def global_norm(tree: Any) -> jax.Array:
    """The square root of the sum of the squares of all entries, in float32 (float64 where a leaf is).

    Shorter floats are widened first: float16 squares overflow from 256 on, and sums of bfloat16 stop growing. Where the
    plain sum overflows, or is so small that squares may have vanished, everything is scaled by its largest entry first. In
    all other steps there is no such second pass over the gradient.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf) and leaf.size]
    if not leaves:
        return jnp.zeros((), jnp.float32)
    dtype = jnp.result_type(*[_real(leaf) for leaf in leaves])

    def squares(leaves: list[jax.Array], scale: jax.Array | None) -> jax.Array:
        total = jnp.zeros((), dtype)
        for leaf in leaves:
            size = _sizes(leaf, dtype)
            total = total + jnp.sum(jnp.square(size if scale is None else size / scale))
        return total

    def scaled(leaves: list[jax.Array]) -> jax.Array:
        largest = jnp.zeros((), dtype)
        for leaf in leaves:
            largest = jnp.maximum(largest, jnp.max(_sizes(leaf, dtype)))  # NaN stays
        usable = jnp.isfinite(largest) & (largest > 0)
        norm = largest * jnp.sqrt(squares(leaves, jnp.where(usable, largest, 1)))
        return jnp.where(usable, norm, largest)

    total = squares(leaves, None)
    in_range = jnp.isfinite(total) & (total > SMALLEST_SUM)
    return jax.lax.cond(in_range, lambda _: jnp.sqrt(total), scaled, leaves)


def _real(leaf: jax.Array) -> Any:
    return sum_dtype(jnp.finfo(leaf.dtype).dtype)  # of complex numbers, that of their parts


def _sizes(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Entries as real numbers whose squares add up to the square of the norm."""
    if jnp.iscomplexobj(leaf):
        return jnp.abs(leaf).astype(dtype)
    return jnp.abs(leaf.astype(dtype))


def clipped(tree: Any, norm: jax.Array, most: float) -> Any:
    """A gradient whose norm is `norm`, scaled down to the norm `most` where it is larger."""
    scale = jnp.minimum(1, most / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))

    def one(leaf: jax.Array) -> jax.Array:
        if not is_inexact(leaf):
            return leaf
        wide = leaf.astype(jnp.promote_types(leaf.dtype, scale.dtype))  # a float16 could not hold a small scale
        return (wide * scale.astype(wide.dtype)).astype(leaf.dtype)

    return jax.tree.map(one, tree)
