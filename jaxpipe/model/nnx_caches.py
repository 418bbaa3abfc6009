"""The caches of flax.nnx modules while tokens are generated.

A module may have one in two ways. Its `__call__` takes `cache` and `position`, and it has a method `init_cache(x, length)`:
then it is like a `jaxpipe.Layer` with one. Or it contains modules that decode as `nnx.MultiHeadAttention` does: with the
attribute `decode`, a method `init_cache(input_shape, dtype)`, and variables of the type `nnx.Cache`. These take one
position at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.model.context import Aux, Context
from jaxpipe.model.nnx_modules import modules
from jaxpipe.model.one_by_one import one_by_one
from jaxpipe.model.shapes import is_inexact


def decodes(module: nnx.Module) -> bool:
    """Whether it contains modules that decode, with caches of their own."""
    return bool(_decoders(module))


def _decoders(module: nnx.Module) -> list[Any]:
    nodes = [node for node, _ in modules(module)]
    return [node for node in nodes if hasattr(node, "decode") and callable(getattr(node, "init_cache", None))]


def prepare(module: nnx.Module, x: Any, length: int) -> None:
    """Lets a module decode, with empty caches for sequences of this length.

    Args:
      x: what the module takes, leaves [B, n, ...].
    """
    first = jax.tree.leaves(x)[0]
    module.set_attributes(decode=True, raise_if_not_found=False)
    for node in _decoders(module):
        width = getattr(node, "in_features", first.shape[-1])
        node.init_cache((first.shape[0], length, width), _dtype(node, x))


def _dtype(node: Any, x: Any) -> Any:
    """The dtype of the keys and values that a module makes, as far as it can be told from outside."""
    if getattr(node, "dtype", None) is not None:
        return node.dtype
    floats = [leaf for leaf in jax.tree.leaves((x, nnx.state(node, nnx.Param))) if is_inexact(leaf)]
    return jnp.result_type(*[leaf.dtype for leaf in floats]) if floats else jnp.zeros(()).dtype


def values(module: nnx.Module) -> list[jax.Array]:
    """The values of all caches, in order."""
    return jax.tree.leaves(nnx.state(module, nnx.Cache))


def put(module: nnx.Module, values: list[jax.Array]) -> None:
    """Sets the values of all caches."""
    state = nnx.state(module, nnx.Cache)
    nnx.update(module, jax.tree.unflatten(jax.tree.structure(state), values))


def empty(module: Any, x: Any, length: int, own: bool) -> Any:
    """The cache of a module before any position, for sequences of this length; `own`: made by its own `init_cache`."""
    if own:
        return module.init_cache(x, length)
    prepare(module, x, length)
    return values(module)


def decode(
    module: nnx.Module, call: Callable[[nnx.Module, Any, Any], Any], x: Any, context: Context
) -> tuple[Any, Aux]:
    """One position after the other, with the caches that modules of flax keep in themselves.

    Args:
      call: `call(module, x, position) -> y`.
      x: a chunk, leaves [B, n, ...].
      context: with a cache that `empty` or this function gave.
    """
    graph, rest = nnx.split(module)

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        cache, position = carry
        again = nnx.merge(graph, rest)
        prepare(again, x, 1)  # of any length: it is the values that count
        put(again, cache)
        y = call(again, x, position)
        return y, (values(again), position + 1)

    y, (cache, _) = one_by_one(step, (context.cache, context.position), x)
    return y, Aux(cache=cache)
