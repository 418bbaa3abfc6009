"""What users put into the layer list, and the one form in which the rest of jaxpipe sees a layer.

A list entry is a `Layer`, a `LayerSpec` / `TiedLayerSpec` (built late, so that no device ever holds the whole model), or
any other callable, which is a layer without parameters. `bind` turns each into a `BoundLayer`: its own name, and a `Kind`,
the functions, which it has in common with the layers that compute the same.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpipe.errors import LayerError
from jaxpipe.model.blame import blame, mark
from jaxpipe.model.keywords import keywords_of
from jaxpipe.model.same import same_value
from jaxpipe.model.values import canonical
from jaxpipe.types import Params, Tree

_WHAT_IS_A_LAYER = (
    "A layer is a jaxpipe.Layer(init, apply), a jaxpipe.LayerSpec(module_class, ...), a jaxpipe.TiedLayerSpec, or any "
    "other callable (a layer without parameters)."
)


@dataclass(frozen=True)
class Layer:
    """A pure pair of functions.

    Attributes:
      init: `init(key, x) -> params`; `x` is a batch of the layer's input (its values are zeros, only shapes count).
      apply: `apply(params, x) -> y`. It may name the keywords `key` (a PRNG key of this layer, micro-batch and data
        rank; None when the caller gave no key), `train` and `deterministic` (bool); they are passed where they have no
        default, or None, or for the flags a bool.
      name: shown in messages and used in the names of parameters; no part of what makes layers alike.

    Raises:
      LayerError: `init` or `apply` is not callable, or `name` no string.
    """

    init: Callable[..., Params]
    apply: Callable[..., Tree]
    name: str = ""

    def __post_init__(self):
        for what in ("init", "apply"):
            if not callable(getattr(self, what)):
                raise LayerError(
                    f"Layer({what}={getattr(self, what)!r}): a layer is a pair of functions, init(key, x) -> params and "
                    "apply(params, x) -> y. One without parameters is a plain function in the layer list."
                )
        if not isinstance(self.name, str):
            raise LayerError(f"Layer(name={self.name!r}): the name of a layer is a string.")


class LayerSpec:
    """A layer that is built where it is needed: `target(*args, **kwargs)`.

    `target` is a `flax.nnx.Module` class or a function that makes such a module (its `rngs` argument is filled in), a
    `flax.linen.Module` class, or a function that returns a `Layer`; a `functools.partial` of these too. Specs that
    compute the same make layers of one kind, which are stacked, sharded over the ranks and scanned.
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
        target = self.target.func if isinstance(self.target, functools.partial) else self.target
        return getattr(target, "__name__", type(target).__name__)

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
        projection. It gets the flax module with its weights, or the params when `target` makes a `Layer`; and `train` and
        `deterministic` (with a `Layer` also `key`) as `Layer.apply` does.
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
        try:
            hash(key)
        except TypeError:
            key = None  # type: ignore[assignment]
        if key is None:
            raise LayerError(
                "TiedLayerSpec(key, ...): the key, a string, names the tie, but it was None or unhashable."
            )
        if forward_fn is not None and not callable(forward_fn):
            raise LayerError(
                f"TiedLayerSpec({key!r}, ..., forward_fn={forward_fn!r}): it is a function (module, x) -> y."
            )
        self.key, self.forward_fn = key, forward_fn

    def __repr__(self) -> str:
        return f"Tied[{self.key}]:{super().__repr__()}"


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


def _recipe_of_callable(function: Callable[..., Tree]) -> Recipe:
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
        return named.call(function, data, {"key": key, "train": train, "deterministic": deterministic})

    return apply, "key" in named


def _recipe(entry: Any, index: int) -> Recipe:
    # flax is imported late: `import jaxpipe` alone should not pay for it.
    from jaxpipe.model import flax_adapters

    flax_adapters.reject_built_modules(entry, index)
    if isinstance(entry, LayerSpec):
        with blame(f"layer {index}, {entry!r}"):
            return flax_adapters.recipe(entry, index)
    if isinstance(entry, Layer):
        return recipe_of_layer(getattr(entry.apply, "__name__", "Layer").strip("<>"), entry)
    if callable(entry) and not inspect.isclass(entry):
        return _recipe_of_callable(entry)
    raise LayerError(f"Layer {index} is {entry!r}. {_WHAT_IS_A_LAYER}")


def _adapted(recipe: Recipe, entry: Any, index: int) -> Kind:
    with blame(f"layer {index}, {entry!r}"):
        return recipe.adapt()


def bind_alone(entry: Any, index: int) -> BoundLayer:
    """Adapts one entry of a layer list by itself, whether or not another one is like it.

    Raises:
      LayerError: the entry is not a layer.
    """
    recipe = _recipe(entry, index)
    tie = entry.key if isinstance(entry, TiedLayerSpec) else None
    return BoundLayer(recipe.name, _adapted(recipe, entry, index), tie, entry)


def bind(entries: Iterable[Any]) -> tuple[BoundLayer, ...]:
    """Adapts every entry of a layer list; entries that compute the same share a `Kind`, with one name the whole object.

    Raises:
      LayerError: an entry is not a layer, or two uses of one tie key disagree.
    """
    bound: list[BoundLayer] = []
    known: list[tuple[Any, Kind]] = []
    named: dict[tuple[str, int], BoundLayer] = {}
    owners: dict[str, tuple[int, TiedLayerSpec]] = {}
    for index, entry in enumerate(entries):
        tie = entry.key if isinstance(entry, TiedLayerSpec) else None
        if isinstance(entry, TiedLayerSpec):
            first, owner = owners.setdefault(entry.key, (index, entry))
            if not same_value((owner.target, owner.args, owner.kwargs), (entry.target, entry.args, entry.kwargs)):
                raise LayerError(
                    f"Layers {first} and {index} are tied by the key {tie!r} but differ: {owner!r} and {entry!r}. All "
                    "uses of one key name the same target and arguments; give them different forward_fn instead."
                )
        earlier = next((layer for layer in reversed(bound) if layer.entry is entry), None)
        if earlier is not None:
            bound.append(earlier)
            continue
        recipe = _recipe(entry, index)
        source = tie, recipe.source
        kind = next((kind for other, kind in known if same_value(other, source)), None)
        if kind is None:
            kind = _adapted(recipe, entry, index)
            known.append((source, kind))
        layer = BoundLayer(recipe.name, kind, tie, entry)
        bound.append(named.setdefault((recipe.name, id(kind)), layer))
    if not bound:
        raise LayerError("The layer list is empty. A pipeline needs at least one layer.")
    return tuple(bound)
