"""Shapes and dtypes without arrays, and how messages show them."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpipe.types import Avals, Shape, Structure, Tree


class HasDtype(Protocol):
    """An array, or a `jax.ShapeDtypeStruct`."""

    @property
    def dtype(self) -> Any: ...


def aval(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, as JAX would see it. The leaf may be anything that NumPy can make an array of."""
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    if not isinstance(x, jax.ShapeDtypeStruct):
        x = np.asarray(x)
    # What JAX makes of it: int64 is int32 unless 64-bit values are enabled.
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))


def avals(tree: Tree) -> Avals:
    """The `aval` of every leaf, in the same structure."""
    return jax.tree.map(aval, tree)


def signature(tree: Tree) -> tuple[Structure, tuple[tuple[Shape, str], ...]]:
    """A hashable value that is equal for trees of the same structure, shapes and dtypes, and for no others."""
    leaves, structure = jax.tree.flatten(avals(tree))
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def is_inexact(x: HasDtype) -> bool:
    """Whether a leaf holds floats or complex numbers, which have derivatives."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def is_key(x: Any) -> bool:
    """Whether a leaf, which has a dtype, is a typed PRNG key or an array of typed keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def sum_dtype(dtype: DTypeLike) -> Any:
    """The dtype in which many values are summed: float32 for shorter floats, whose mantissa would lose small terms."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32 else dtype


def describe(tree: Tree) -> str:
    """The text for messages: `float32[8,16]` for a leaf, and such texts in their structure for a tree."""

    class Text:  # a leaf that prints without quotes
        def __init__(self, text: str):
            self.text = text

        def __repr__(self) -> str:
            return self.text

    def one(leaf: Any) -> Text:
        leaf = aval(leaf)
        return Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    return repr(jax.tree.map(one, tree))
