"""Abstract values: shapes and dtypes without arrays, and how messages show them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.types import Tree


def aval(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array-like leaf, as JAX would see it."""
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    if not isinstance(x, jax.ShapeDtypeStruct):
        x = np.asarray(x)
    # What JAX makes of it: int64 is int32 unless 64-bit values are enabled.
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))


def avals(tree: Tree) -> Tree:
    """`aval` of every leaf."""
    return jax.tree.map(aval, tree)


def signature(tree: Tree) -> tuple[Any, ...]:
    """A hashable value that is equal exactly for trees of equal structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(avals(tree))
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def is_inexact(x: Any) -> bool:
    """Whether a leaf has derivatives (floats and complex numbers)."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def is_key(x: Any) -> bool:
    """Whether a leaf is a typed PRNG key, or an array of them."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def sum_dtype(dtype: Any) -> Any:
    """The dtype to sum many values in: float32 for shorter floats, whose mantissa would swallow small terms."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32 else dtype


def describe(tree: Tree) -> str:
    """`float32[8,16]`; for trees, the leaves in their structure."""

    class Text:  # a leaf that prints without quotes
        def __init__(self, text: str):
            self.text = text

        def __repr__(self) -> str:
            return self.text

    def one(leaf: Any) -> Text:
        leaf = aval(leaf)
        return Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    return repr(jax.tree.map(one, tree))
