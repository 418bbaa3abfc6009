"""The one form in which the rest of jaxpipe sees a layer: its own name, and a `Kind`.

A kind is what a layer computes. Layers that compute the same share one, which is why they can be stacked and scanned. A
`Recipe` says how a list entry becomes a kind; those of flax modules are made in `linen_layers` and `nnx_layers`, those of
functions here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpipe.model.blame import mark
from jaxpipe.model.keywords import keywords_of
from jaxpipe.model.specs import Layer
from jaxpipe.model.values import canonical
from jaxpipe.types import Params, Tree


@dataclass(frozen=True, eq=False)
class Kind:
    """The functions of a layer. Layers of one kind share one object; what the functions return is `canonical`.

    Attributes:
      init: `init(key, x) -> params`, traceable.
      apply: `apply(params, x, key, train) -> y`, traceable; `key` may be None.
      uses_key: whether `apply` looks at `key`.
    """

    init: Callable[[jax.Array, Tree], Params]
    apply: Callable[..., Tree]
    uses_key: bool = False

    def __post_init__(self):
        object.__setattr__(self, "init", _guarded(self.init))
        object.__setattr__(self, "apply", _guarded(self.apply))


def _guarded(function: Callable[..., Tree]) -> Callable[..., Tree]:
    def call(*args: Any, **flags: bool) -> Tree:
        try:
            return canonical(function(*args, **flags))
        except Exception as error:
            mark(error)
            raise

    return call


@dataclass(frozen=True)
class Recipe:
    """How a list entry becomes a layer.

    Attributes:
      name: for messages.
      source: what decides on the kind; entries whose sources are the same value compute the same.
      adapt: makes the kind, which may mean tracing the constructor of a module.
    """

    name: str
    source: Any
    adapt: Callable[[], Kind]


@dataclass(frozen=True, eq=False)
class BoundLayer:
    """A layer as the rest of jaxpipe sees it.

    Attributes:
      name: its own, for messages.
      kind: what it computes.
      tie: key of the `TiedLayerSpec`, or None.
      entry: what stands in the layer list.
    """

    name: str
    kind: Kind
    tie: str | None = None
    entry: Any = field(default=None, repr=False)

    @property
    def init(self) -> Callable[[jax.Array, Tree], Params]:
        return self.kind.init

    @property
    def apply(self) -> Callable[[Params, Tree, jax.Array | None, bool], Tree]:
        return self.kind.apply

    @property
    def uses_key(self) -> bool:
        return self.kind.uses_key


def recipe_of_layer(name: str, layer: Layer, forward_fn: Callable[..., Tree] | None = None) -> Recipe:
    """The recipe of a pair of functions; `name` is used if the layer has none."""
    function = layer.apply if forward_fn is None else forward_fn

    def adapt() -> Kind:
        apply, uses_key = _calling(function, 2)
        return Kind(layer.init, lambda params, x, key, train: apply((params, x), key, train), uses_key)

    return Recipe(layer.name or name, (Layer, layer.init, layer.apply, forward_fn), adapt)


def recipe_of_callable(function: Callable[..., Tree]) -> Recipe:
    """The recipe of a function without parameters."""
    bare = function.func if isinstance(function, functools.partial) else function

    def adapt() -> Kind:
        apply, uses_key = _calling(function, 1)
        return Kind(lambda key, x: {}, lambda params, x, key, train: apply((x,), key, train), uses_key)

    return Recipe(getattr(bare, "__name__", type(bare).__name__).strip("<>"), (None, function), adapt)


def _calling(function: Callable[..., Tree], num_data: int) -> tuple[Callable[..., Tree], bool]:
    """`(data, key, train) -> function(*data, ...)` with the keywords that it takes, and whether it takes a key."""
    named = keywords_of(function, num_data)

    def apply(data: tuple[Any, ...], key: jax.Array | None, train: bool) -> Tree:
        # Without a key there is no dropout.
        deterministic = not train or ("key" in named and key is None)
        positions, names = named.arguments({"key": key, "train": train, "deterministic": deterministic})
        return function(*data, *positions, **names)

    return apply, "key" in named
