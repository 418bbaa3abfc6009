"""What travels between layers: JAX arrays of canonical dtypes, without weak types, whatever the layers return.

Every layer's output passes `canonical` before anything else looks at it. So a NumPy array of 64-bit numbers is what JAX
makes of it everywhere, a Python scalar is an array like any other, and no scan, buffer or message needs to know where a
value came from. PRNG keys stay keys; where only plain numbers can go (messages, buffers), `raw` and `typed` translate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.model.blame import Fault
from jaxpipe.model.shapes import aval, is_key
from jaxpipe.types import Tree


def canonical(tree: Tree) -> Tree:
    """The tree with every leaf made into a JAX array of a canonical, strong dtype.

    Raises:
      Fault: a leaf is nothing that JAX can compute with.
    """
    return jax.tree_util.tree_map_with_path(_leaf, tree)


def _leaf(path: tuple[Any, ...], leaf: Any) -> jax.Array:
    if isinstance(leaf, np.ndarray) and leaf.dtype == jax.dtypes.float0:
        return jnp.zeros(leaf.shape, bool)  # the gradient of an integer; no device has such an array
    try:
        if isinstance(leaf, (jax.ShapeDtypeStruct, str, bytes)):
            raise TypeError("it is no number")
        made = jnp.asarray(leaf)
        if not isinstance(made, jax.Array):
            raise TypeError(f"JAX has no dtype {made.dtype}")
        return made if is_key(made) else jax.lax.convert_element_type(made, made.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        where = f", as the entry {jax.tree_util.keystr(path)}" if path else ""
        raise Fault(
            f"returned {_short(leaf)} of type {type(leaf).__name__}{where}. Layers return arrays, numbers, booleans or "
            f"PRNG keys, in any pytree ({error})."
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def raw_aval(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The abstract value of what `raw` makes of such a leaf."""
    return aval(jax.eval_shape(jax.random.key_data, leaf)) if is_key(leaf) else leaf


def raw(leaf: jax.Array) -> jax.Array:
    """A leaf as plain numbers: the words of a PRNG key, and everything else as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def typed(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of `raw`; `like` is the abstract value of what it was made from."""
    return jax.random.wrap_key_data(leaf, impl=_impl(like)) if is_key(like) else leaf


def _impl(key: jax.ShapeDtypeStruct) -> Any:
    found: list[Any] = []
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
    return found[0]
