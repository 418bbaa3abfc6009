"""From the entries of a layer list to bound layers.

A list entry is a `Layer`, a `LayerSpec` / `TiedLayerSpec`, a flax module that is built already, or any other callable,
which is a layer without parameters. `bind` turns each into a `BoundLayer`: its own name, and a `Kind`, the functions, which
it has in common with the layers that compute the same.
"""

import inspect
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

from jaxpipe.errors import LayerError
from jaxpipe.model.blame import blame
from jaxpipe.model.function_layers import recipe_of_callable, recipe_of_layer
from jaxpipe.model.kinds import BoundLayer, Kind, Recipe
from jaxpipe.model.same import same_value
from jaxpipe.model.specs import Layer, LayerSpec, TiedLayerSpec

_WHAT_IS_A_LAYER = (
    "A layer is a jaxpipe.Layer(init, apply), a jaxpipe.LayerSpec(module_class, ...), a jaxpipe.TiedLayerSpec, a flax "
    "module that is built already, or any other callable (a layer without parameters)."
)


def _recipe(entry: Any, index: int) -> Recipe:
    # A module that is built can only be in a program that has imported flax.
    if isinstance(entry, LayerSpec) or sys.modules.get("flax") is not None:
        if (found := _built().found(entry)) is not None:
            with blame(f"layer {index}, {found!r}"):
                return _built().recipe(found)
        _adapters().reject_hidden_modules(entry, index)
    if isinstance(entry, LayerSpec):
        with blame(f"layer {index}, {entry!r}"):
            return _adapters().recipe(entry, index)
    if isinstance(entry, Layer):
        return recipe_of_layer(getattr(entry.apply, "__name__", "Layer").strip("<>"), entry)
    if callable(entry) and not inspect.isclass(entry):
        return recipe_of_callable(entry)
    raise LayerError(f"Layer {index} is {entry!r}. {_WHAT_IS_A_LAYER}")


def _adapters() -> Any:
    """The only way from here to flax, which is slow to import: a model without it does not pay for it."""
    from jaxpipe.model import flax_adapters

    return flax_adapters


def _built() -> Any:
    from jaxpipe.model import built

    return built


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
    return BoundLayer(
        recipe.name, _adapted(recipe, entry, index), tie, entry, recipe.given, recipe.build, recipe.given_state
    )


def bind(entries: Iterable[Any]) -> tuple[BoundLayer, ...]:
    """Adapts every entry of a layer list; entries that compute the same share a `Kind`, with one name the whole object.

    Raises:
      LayerError: an entry is not a layer, or two uses of one tie key disagree.
    """
    bound: list[BoundLayer] = []
    known: list[tuple[Any, Kind]] = []
    named: dict[tuple[str, int], BoundLayer] = {}
    owners: dict[str, tuple[int, TiedLayerSpec]] = {}
    entries = tuple(entries)
    for index, (entry, tie) in enumerate(zip(entries, _ties(entries), strict=True)):
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
        layer = BoundLayer(recipe.name, kind, tie, entry, recipe.given, recipe.build, recipe.given_state)
        bound.append(layer if recipe.given is not None else named.setdefault((recipe.name, id(kind)), layer))
    if not bound:
        raise LayerError("The layer list is empty. A pipeline needs at least one layer.")
    return tuple(bound)


def _ties(entries: Sequence[Any]) -> list[Hashable]:
    """For each entry what it has in common with those that share its weights; None if there are none."""
    ties: list[Hashable] = [entry.key if isinstance(entry, TiedLayerSpec) else None for entry in entries]
    if sys.modules.get("flax") is None:
        return ties
    return [own if tie is None else tie for own, tie in zip(ties, _built().ties(entries), strict=True)]


def entries_of(layers: Any) -> tuple[Any, ...]:
    """The entries of a list of layers.

    Raises:
      LayerError: it is anything else, such as a set, a dict or a single layer.
    """
    if (
        isinstance(layers, (Layer, LayerSpec, str, bytes, Mapping, Set))
        or callable(layers)
        or not isinstance(layers, Iterable)
    ):
        shown = " ".join(repr(layers).split())
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise LayerError(
            f"PipelineModule({shown}): the first argument is a {type(layers).__name__}, but it is the list of layers, in "
            "order, such as [jaxpipe.LayerSpec(Embed, 64), jaxpipe.LayerSpec(Block, 64), jax.nn.relu]."
        )
    return tuple(layers)
