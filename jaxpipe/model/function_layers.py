"""Layers that are functions: how a `jaxpipe.Layer`, and any other callable in the list, becomes a kind."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxpipe.model.blame import Fault
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.keywords import Keywords, keywords_of
from jaxpipe.model.kinds import Kind, Recipe
from jaxpipe.model.specs import Layer
from jaxpipe.types import Params, Tree


def recipe_of_layer(name: str, layer: Layer, forward_fn: Callable[..., Tree] | None = None) -> Recipe:
    """The recipe of a pair of functions; `name` is used if the layer has none."""
    function = layer.apply if forward_fn is None else forward_fn

    def adapt() -> Kind:
        if layer.stateful:
            return _stateful(layer, function, forward_fn is not None)
        call, named = _calling(function, 2)
        return Kind(
            layer.init,
            lambda params, x, context, train: with_cache(call((params, x), context, train), context),
            "key" in named,
            init_cache=_cache_of(layer, named, forward_fn is not None, "y"),
            knows_position="position" in named,
        )

    source = Layer, layer.init, layer.apply, layer.init_cache, layer.stateful, forward_fn
    return Recipe(layer.name or name, source, adapt)


def _cache_of(layer: Layer, named: Keywords, other: bool, y: str) -> Callable[[Params, Tree, Tree, int], Tree] | None:
    """The `init_cache` of a kind.

    Args:
      named: the keywords of what is called.
      other: whether that is another function than the layer's own, which need not take the cache.
      y: what it returns without a cache, for the message.
    """
    make = layer.init_cache
    if make is None or (other and "cache" not in named):
        return None
    if "cache" not in named:
        state, cached = ("", "(y, cache)") if y == "y" else ("state, ", "((y, cache), state)")
        raise Fault(
            "has an init_cache, but its apply takes no `cache`. While tokens are generated it is called as "
            f"apply(params, {state}x, cache=..., position=...) and returns {cached}; in training both are None, and it "
            f"returns {y}."
        )
    return lambda params, state, x, length: make(x, length)


def _stateful(layer: Layer, function: Callable[..., Tree], other: bool) -> Kind:
    """The kind of a pair of functions with state."""
    call, named = _calling(function, 3)
    if not _takes(function, 3):
        raise Fault(
            "is a jaxpipe.Layer with stateful=True, which is called as apply(params, state, x), but its function takes "
            "less. Give it the parameter, or leave stateful out."
        )

    def init(part: int) -> Callable[[jax.Array, Tree], Tree]:
        def one(key: jax.Array, x: Tree) -> Tree:
            return _pair(layer.init(key, x), "init", "(params, state)")[part]

        return one

    def apply(params: Params, x: Tree, context: Context, train: bool) -> tuple[Tree, Aux]:
        returned, state = _pair(call((params, context.state, x), context, train), "apply", "(y, new state)")
        y, aux = with_cache(returned, context)
        return y, aux._replace(state=state)

    return Kind(
        init(0),
        apply,
        "key" in named,
        init_cache=_cache_of(layer, named, other, "(y, state)"),
        knows_position="position" in named,
        init_state=init(1),
    )


def _takes(function: Callable[..., object], count: int) -> bool:
    """Whether a function takes so many arguments by position, as far as it can be told."""
    try:
        inspect.signature(function).bind_partial(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


def _pair(found: Any, function: str, wanted: str) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise Fault(
            f"is a jaxpipe.Layer with stateful=True, whose {function} returns {wanted}, but it returned {what}."
        )
    return found


def recipe_of_callable(function: Callable[..., Tree]) -> Recipe:
    """The recipe of a function without parameters."""
    bare = function.func if isinstance(function, functools.partial) else function

    def adapt() -> Kind:
        call, named = _calling(function, 1)
        return Kind(
            lambda key, x: {},
            lambda params, x, context, train: with_cache(call((x,), context, train), context),
            "key" in named,
            knows_position="position" in named,
        )

    return Recipe(getattr(bare, "__name__", type(bare).__name__).strip("<>"), (None, function), adapt)


def _calling(function: Callable[..., Tree], num_data: int) -> tuple[Callable[..., Tree], Keywords]:
    """`(data, context, train) -> function(*data, ...)` with the keywords that it takes, and these."""
    named = keywords_of(function, num_data)

    def call(data: tuple[Any, ...], context: Context, train: bool) -> Tree:
        key = context.key
        # Without a key there is no dropout.
        deterministic = not train or ("key" in named and key is None)
        values = {"key": key, "train": train, "deterministic": deterministic}
        positions, names = named.arguments({**values, "cache": context.cache, "position": context.position})
        return function(*data, *positions, **names)

    return call, named


def with_cache(returned: Any, context: Context) -> tuple[Tree, Aux]:
    """Output and cache from what a function has returned: a pair if it was given a cache, else the output alone.

    Raises:
      Fault: it was given a cache and returns no pair.
    """
    if context.cache is None:
        return returned, Aux()
    if not isinstance(returned, tuple) or len(returned) != 2:
        kind = (
            f"{type(returned).__name__} of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        )
        raise Fault(
            f"was given a cache and returned a {kind}. While tokens are generated it returns a pair (y, cache)."
        )
    return returned[0], Aux(cache=returned[1])
