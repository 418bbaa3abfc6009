"""What users put into the layer list, and the one form in which the rest of jaxpipe sees a layer.

A list entry is a `Layer`, a `LayerSpec` / `TiedLayerSpec` (built late, so that no device ever holds the whole model), or
any other callable, which is a layer without parameters. `bind` turns each into a `BoundLayer`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpipe.errors import LayerError
from jaxpipe.model.same import same_value

Params = Any
Tree = Any


@dataclass(frozen=True)
class Layer:
    """A pure pair of functions.

    Attributes:
      init: `init(key, x) -> params`; `x` is a batch of the layer's input (its values are zeros, only shapes count).
      apply: `apply(params, x) -> y`. It may name the keywords `key` (a PRNG key of this layer, micro-batch and data
        rank; None when the caller gave no key) and `train` (bool); they are passed when named.
      name: shown in messages and used in the names of parameters.
    """

    init: Callable[..., Params]
    apply: Callable[..., Tree]
    name: str = ""


class LayerSpec:
    """A layer that is built where it is needed: `target(*args, **kwargs)`.

    `target` is a `flax.nnx.Module` class (its `rngs` argument is filled in), a `flax.linen.Module` class, or a function
    that returns a `Layer`. Equal specs make layers of one kind, which are stacked, sharded over the ranks and scanned.
    """

    def __init__(self, target: Callable[..., Any], *args: Any, **kwargs: Any):
        if not callable(target):
            raise LayerError(
                f"LayerSpec({target!r}): the first argument is a flax module class or a function that returns a "
                "jaxpipe.Layer; the arguments to build it with follow."
            )
        self.target, self.args, self.kwargs = target, args, kwargs

    @property
    def name(self) -> str:
        return getattr(self.target, "__name__", type(self.target).__name__)

    def __repr__(self) -> str:
        arguments = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"{self.name}({', '.join(arguments)})"


class TiedLayerSpec(LayerSpec):
    """A layer that shares one set of weights with every other `TiedLayerSpec` of the same `key`.

    The first use in the list owns the weights: its arguments build them, its index seeds and stores them. Gradients of
    all uses are summed.

    Args:
      key: identity of the tie.
      target: as for `LayerSpec`; all uses of one key name the same target and arguments.
      forward_fn: `forward_fn(module, x)` replaces the plain call, for example to use an embedding as the output
        projection. It gets the flax module with its weights, or the params when `target` makes a `Layer`.
    """

    def __init__(
        self,
        key: str,
        target: Callable[..., Any],
        *args: Any,
        forward_fn: Callable[..., Tree] | None = None,
        **kwargs: Any,
    ):
        super().__init__(target, *args, **kwargs)
        self.key, self.forward_fn = key, forward_fn

    def __repr__(self) -> str:
        return f"Tied[{self.key}]:{super().__repr__()}"


@dataclass(frozen=True, eq=False)
class BoundLayer:
    """A layer as the rest of jaxpipe sees it; two list entries of one kind share one object.

    Attributes:
      name: for messages.
      init: `init(key, x) -> params`, traceable.
      apply: `apply(params, x, key, train) -> y`, traceable; `key` may be None.
      uses_key: whether `apply` looks at `key`.
      tie: key of the `TiedLayerSpec`, or None.
    """

    name: str
    init: Callable[[jax.Array, Tree], Params]
    apply: Callable[[Params, Tree, jax.Array | None, bool], Tree]
    uses_key: bool = False
    tie: str | None = None
    entry: Any = field(default=None, repr=False)


def keywords_named(function: Callable[..., Any], names: Iterable[str], num_data: int) -> set[str]:
    """Which of `names` the signature of `function` mentions by name, after its first `num_data` parameters.

    A keyword that a `functools.partial` has set already stays as it is set.
    """
    try:
        parameters = dict(list(inspect.signature(function).parameters.items())[num_data:])
    except (TypeError, ValueError):
        return set()
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    names = set(names) - set(fixed)
    return {
        name
        for name in names
        if name in parameters
        and parameters[name].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    }


def with_keywords(function: Callable[..., Tree], named: set[str]) -> Callable[..., Tree]:
    """`function(params, x, key, train)` passing on only the keywords in `named`."""

    def apply(params: Params, x: Tree, key: jax.Array | None, train: bool) -> Tree:
        available = {"key": key, "train": train}
        return function(params, x, **{name: available[name] for name in named})

    return apply


def _from_layer(layer: Layer, forward_fn: Callable[..., Tree] | None = None) -> BoundLayer:
    function = layer.apply if forward_fn is None else forward_fn
    named = keywords_named(function, ("key", "train"), 2)
    name = layer.name or getattr(layer.apply, "__name__", "Layer").strip("<>")
    return BoundLayer(name, layer.init, with_keywords(function, named), uses_key="key" in named)


def _from_callable(function: Callable[..., Tree]) -> BoundLayer:
    named = keywords_named(function, ("key", "train"), 1)
    bare = function.func if isinstance(function, functools.partial) else function
    name = getattr(bare, "__name__", type(bare).__name__).strip("<>")
    return BoundLayer(
        name,
        lambda key, x: {},
        with_keywords(lambda params, x, **keywords: function(x, **keywords), named),
        uses_key="key" in named,
    )


def _from_spec(spec: LayerSpec, index: int) -> BoundLayer:
    # flax is imported late: `import jaxpipe` alone should not pay for it.
    from jaxpipe.model import flax_adapters

    forward_fn = getattr(spec, "forward_fn", None)
    bound = flax_adapters.adapt(spec, forward_fn)
    if bound is None:
        built = spec.target(*spec.args, **spec.kwargs)
        if not isinstance(built, Layer):
            raise LayerError(
                f"Layer {index}, LayerSpec({spec!r}), made a {type(built).__name__}. The target must be a flax.nnx or "
                "flax.linen module class, or a function that returns a jaxpipe.Layer(init, apply)."
            )
        bound = _from_layer(built, forward_fn)
    return bound


def _same_entry(a: Any, b: Any) -> bool:
    """Whether two list entries are layers of one kind (same functions, same arguments)."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, LayerSpec):
        return same_value(a.__dict__, b.__dict__)
    if isinstance(a, Layer):
        return same_value((a.init, a.apply, a.name), (b.init, b.apply, b.name))
    return same_value(a, b)


def bind_alone(entry: Any, index: int) -> BoundLayer:
    """Adapts one entry of a layer list by itself; `bind` shares the result with equal entries.

    Raises:
      LayerError: the entry is not a layer.
    """
    from jaxpipe.model import flax_adapters

    flax_adapters.reject_built_module(entry, index)
    if isinstance(entry, LayerSpec):
        layer = _from_spec(entry, index)
    elif isinstance(entry, Layer):
        layer = _from_layer(entry)
    elif callable(entry) and not inspect.isclass(entry):
        layer = _from_callable(entry)
    else:
        raise LayerError(
            f"Layer {index} is {entry!r}. A layer is a jaxpipe.Layer(init, apply), a jaxpipe.LayerSpec(module_class, "
            "...), a jaxpipe.TiedLayerSpec, or any other callable (a layer without parameters)."
        )
    tie = entry.key if isinstance(entry, TiedLayerSpec) else None
    return BoundLayer(layer.name, layer.init, layer.apply, layer.uses_key, tie, entry)


def bind(entries: Iterable[Any]) -> tuple[BoundLayer, ...]:
    """Adapts every entry of a layer list; equal entries get the same `BoundLayer` object.

    Raises:
      LayerError: an entry is not a layer, or two uses of one tie key disagree.
    """
    bound: list[BoundLayer] = []
    owners: dict[str, tuple[int, TiedLayerSpec]] = {}
    for index, entry in enumerate(entries):
        known = next((layer for layer in bound if _same_entry(layer.entry, entry)), None)
        if known is not None:
            bound.append(known)
            continue
        if isinstance(entry, TiedLayerSpec):
            first, owner = owners.setdefault(entry.key, (index, entry))
            if not same_value((owner.target, owner.args, owner.kwargs), (entry.target, entry.args, entry.kwargs)):
                raise LayerError(
                    f"Layers {first} and {index} are tied by the key {entry.key!r} but differ: {owner!r} and {entry!r}. "
                    "All uses of one key name the same target and arguments; give them different forward_fn instead."
                )
        bound.append(bind_alone(entry, index))
    if not bound:
        raise LayerError("The layer list is empty. A pipeline needs at least one layer.")
    return tuple(bound)
