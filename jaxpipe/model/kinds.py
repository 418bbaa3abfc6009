"""The one form in which the rest of jaxpipe sees a layer: its own name, and a `Kind`.

A kind is what a layer computes. Layers that compute the same share one, which is why they can be stacked and scanned. A
`Recipe` says how a list entry becomes a kind; those of flax modules are made in `linen_layers` and `nnx_layers`, those of
functions in `function_layers`.
"""

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpipe.model.axes import Annotations
from jaxpipe.model.blame import mark
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.opening import opened
from jaxpipe.model.states import check_state, settled
from jaxpipe.model.values import canonical
from jaxpipe.types import Key, Params, Tree


@dataclass(frozen=True, eq=False)
class Kind:
    """The functions of a layer. Layers of one kind share one object; what the functions return is `canonical`.

    Attributes:
      init: `init(key, x) -> params`, traceable.
      apply: `apply(params, x, context, train) -> (y, aux)`, traceable: see `Context` and `Aux`.
      uses_key: whether `apply` looks at `context.key`, which may be None.
      init_cache: `init_cache(params, state, x, length) -> cache`, traceable: what the layer keeps of the positions of
        sequences of this length while tokens are generated; a tree without leaves for nothing. None if it never keeps any.
      knows_position: whether `apply` looks at `context.position`.
      annotations: what flax says about the dims of the params; None as long as `init`, which has to run for that, was not
        traced.
      dropped: what the module sows and nobody takes, as far as `apply` was traced.
      init_state: `init_state(key, x) -> state` with the key of `init`, traceable; None if there is none for sure.
    """

    init: Callable[[jax.Array, Tree], Params]
    apply: Callable[..., tuple[Tree, Aux]]
    uses_key: bool = False
    annotations: Annotations | None = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    init_cache: Callable[[Params, Tree, Tree, int], Tree] | None = None
    knows_position: bool = False
    init_state: Callable[[jax.Array, Tree], Tree] | None = None

    def __post_init__(self):
        object.__setattr__(self, "init", _guarded(self._without_boxes(self.init)))
        object.__setattr__(self, "apply", _with_state(_guarded(_taken_apart(self.apply))))
        if self.init_cache is not None:
            object.__setattr__(self, "init_cache", _guarded(self.init_cache))
        if self.init_state is not None:
            object.__setattr__(self, "init_state", _checked_state(_guarded(self.init_state)))

    def _without_boxes(self, init: Callable[[jax.Array, Tree], Params]) -> Callable[[jax.Array, Tree], Params]:
        def plain(key: jax.Array, x: Tree) -> Params:
            params, found = take_off_boxes(init(key, x))
            if found or self.annotations is None:
                object.__setattr__(self, "annotations", found)
            return params

        return plain


def take_off_boxes(params: Params) -> tuple[Params, Annotations]:
    """The params without the boxes of flax.linen, and what those said; see `flax_axes`."""
    if "flax" not in sys.modules:  # it is slow to import, and who has not done so has no boxes
        return params, {}
    from jaxpipe.model import flax_axes

    return flax_axes.take_off(params)


def _with_state(apply: Callable[..., tuple[Tree, Aux]]) -> Callable[..., tuple[Tree, Aux]]:
    """`apply` with the new state in the form of the old one; in evaluation it is the old one."""

    def call(params: Params, x: Tree, context: Context, train: bool) -> tuple[Tree, Aux]:
        y, aux = apply(params, x, context, train)
        return y, aux._replace(state=settled(context.state, aux.state) if train else context.state)

    return call


def _checked_state(init_state: Callable[[jax.Array, Tree], Tree]) -> Callable[[jax.Array, Tree], Tree]:
    def call(key: jax.Array, x: Tree) -> Tree:
        state = take_off_boxes(init_state(key, x))[0]
        check_state(state)
        return state

    return call


def _guarded(function: Callable[..., Tree]) -> Callable[..., Tree]:
    def call(*args: Any, **flags: bool) -> Tree:
        try:
            made = function(*args, **flags)
            if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Aux):
                return canonical(made[0]), canonical(made[1])  # one by one, so that errors name paths in the output
            return canonical(made)
        except Exception as error:
            mark(error)
            raise

    return call


def _taken_apart(apply: Callable[..., tuple[Any, Aux]]) -> Callable[..., tuple[Tree, Aux]]:
    """A layer that may return a `LayerOut`, as one that returns its output, and the rest beside it."""

    def call(*args: Any, **flags: bool) -> tuple[Tree, Aux]:
        result, aux = apply(*args, **flags)
        y, losses, metrics = opened(result, aux)
        return y, aux._replace(losses=losses, metrics=metrics)

    return call


@dataclass(frozen=True)
class Recipe:
    """How a list entry becomes a layer.

    Attributes:
      name: for messages.
      source: what decides on the kind; entries whose sources are the same value compute the same.
      adapt: makes the kind, which may mean tracing the constructor of a module.
      given: the params that the entry brings along, arrays or their shapes; None if `init` of the kind makes them.
      build: `build(params, state, key)` makes a new module with these params, this state, and random streams of this key;
        None if the layer is no module.
      given_state: the state that the entry brings along; None if `init_state` of the kind makes it.
    """

    name: str
    source: Any
    adapt: Callable[[], Kind]
    given: Params | None = None
    build: Callable[[Params, Tree, Key], Any] | None = None
    given_state: Tree = None


@dataclass(frozen=True, eq=False)
class BoundLayer:
    """A layer as the rest of jaxpipe sees it.

    Attributes:
      name: its own, for messages.
      kind: what it computes.
      tie: the same for layers that share their weights, such as the key of a `TiedLayerSpec`; None if this is no such
        layer.
      entry: what stands in the layer list.
      given, build, given_state: see `Recipe`.
    """

    name: str
    kind: Kind
    tie: Hashable = None
    entry: Any = field(default=None, repr=False)
    given: Params | None = field(default=None, repr=False)
    build: Callable[[Params, Tree, Key], Any] | None = field(default=None, repr=False)
    given_state: Tree = field(default=None, repr=False)

    @property
    def init(self) -> Callable[[jax.Array, Tree], Params]:
        given = self.given
        return self.kind.init if given is None else lambda key, x: given

    @property
    def init_state(self) -> Callable[[jax.Array, Tree], Tree] | None:
        given = self.given_state
        return self.kind.init_state if given is None else lambda key, x: given

    @property
    def apply(self) -> Callable[[Params, Tree, Context, bool], tuple[Tree, Aux]]:
        return self.kind.apply

    @property
    def uses_key(self) -> bool:
        return self.kind.uses_key
