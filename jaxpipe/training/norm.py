"""The norm of a gradient, which is right for all floats that the gradient may hold."""

import jax
import jax.numpy as jnp

from jaxpipe.executor import scopes
from jaxpipe.model.shapes import is_inexact, sum_dtype
from jaxpipe.types import Params

# A sum of squares above this lost nothing that matters: squares vanish in float32 for entries below 1e-19, and the squares
# of 1e9 such entries add up to at most 1e-29.
SMALLEST_SUM = 1e-20


def global_norm(tree: Params) -> jax.Array:
    """The square root of the sum of the squares of all entries.

    Shorter floats are widened first, because squares in float16 overflow from 256 on, and sums in bfloat16 stop growing. If
    the plain sum overflows, or is so small that squares may have vanished, everything is divided by the largest entry in a
    second pass. All other steps have one pass over the gradient.

    Args:
      tree: arrays of any shapes; those without derivatives are left out.

    Returns:
      A scalar [], float32 (float64 if a leaf is float64 or complex128).
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

    @jax.named_scope(scopes.RARE)
    def scaled(leaves: list[jax.Array]) -> jax.Array:
        largest = jnp.zeros((), dtype)
        for leaf in leaves:
            largest = jnp.maximum(largest, jnp.max(_sizes(leaf, dtype)))
        usable = jnp.isfinite(largest) & (largest > 0)
        norm = largest * jnp.sqrt(squares(leaves, jnp.where(usable, largest, 1)))
        return jnp.where(usable, norm, largest)

    total = squares(leaves, None)
    in_range = jnp.isfinite(total) & (total > SMALLEST_SUM)
    norm = jax.lax.cond(in_range, lambda _: jnp.sqrt(total), scaled, leaves)
    # A NaN stays one in the sum, while XLA's maximum over several CPU devices loses it if all of them have one.
    return jnp.where(jnp.isnan(total), total, norm)


def _real(leaf: jax.Array) -> jnp.dtype:
    return sum_dtype(jnp.finfo(leaf.dtype).dtype)  # for complex numbers, the dtype of their parts


def _sizes(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The absolute values of all entries, which are real numbers."""
    if jnp.iscomplexobj(leaf):
        return jnp.abs(leaf).astype(dtype)
    return jnp.abs(leaf.astype(dtype))


def clipped(tree: Params, norm: jax.Array, most: float) -> Params:
    """Scales a gradient down to the norm `most` if its norm is larger.

    Args:
      tree: arrays of any shapes; those without derivatives are not changed.
      norm: what `global_norm` returned for the tree.

    Returns:
      Arrays of the same shapes and dtypes.
    """
    scale = jnp.minimum(1, most / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))

    def one(leaf: jax.Array) -> jax.Array:
        if not is_inexact(leaf):
            return leaf
        wide = leaf.astype(jnp.promote_types(leaf.dtype, scale.dtype))  # float16 could not hold a small scale
        return (wide * scale.astype(wide.dtype)).astype(leaf.dtype)

    return jax.tree.map(one, tree)
