"""The values that travel between layers: JAX arrays of canonical dtypes without weak types, whatever the layers return.

Every output of a layer passes `canonical` before anything else looks at it. So a NumPy array of 64-bit numbers is
everywhere what JAX makes of it, and a Python scalar is an array like any other. No scan, buffer or message needs to know
where a value came from. PRNG keys stay keys; where only plain numbers can go (messages, buffers), `raw` and `typed`
translate.
"""

from collections.abc import Callable, Collection, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.model.blame import Fault
from jaxpipe.model.shapes import aval, is_inexact, is_key
from jaxpipe.types import KeyPath, Leaves, Tree


def canonical(tree: Tree) -> Tree:
    """Makes every leaf a JAX array of the same shape, with a canonical dtype that is not weakly typed.

    Raises:
      Fault: JAX cannot compute with a leaf.
    """
    return jax.tree_util.tree_map_with_path(_leaf, tree)


def _leaf(path: KeyPath, leaf: Any) -> jax.Array:
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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def raw_aval(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape and dtype of what `raw` makes of a leaf of this shape and dtype."""
    return aval(jax.eval_shape(jax.random.key_data, leaf)) if is_key(leaf) else leaf


def raw(leaf: jax.Array) -> jax.Array:
    """Makes plain numbers of a leaf: typed PRNG keys [...] become uint32 [..., words]. Other leaves stay as they are."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def typed(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of `raw`; `like` is the shape and dtype of the original leaf."""
    return jax.random.wrap_key_data(leaf, impl=_impl(like)) if is_key(like) else leaf


def _impl(key: jax.ShapeDtypeStruct) -> Hashable:
    found: list[Hashable] = []
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
    return found[0]


def split_inexact(tree: Tree, but: Collection[int] = ()) -> tuple[Leaves, Callable[[Leaves], Tree]]:
    """The leaves that have derivatives, and the function that puts such leaves back into the tree.

    Args:
      but: the numbers of leaves that are left out.
    """
    leaves, structure = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if is_inexact(leaf) and i not in but]

    def rebuild(values: Leaves) -> Tree:
        full = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in chosen], rebuild
