"""The layers of a model one after the other on one device, as a loop would run them; for the oracle."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.model import keys
from jaxpipe.model.blame import blame
from jaxpipe.model.context import Context
from jaxpipe.model.kinds import BoundLayer
from jaxpipe.model.shapes import describe
from jaxpipe.types import Key, Params, Tree


def run_layers(
    entries: Sequence[BoundLayer],
    owners: Sequence[int],
    layers: Sequence[Params],
    states: Sequence[Tree],
    x: Tree,
    key: Key | None,
    train: bool,
    short: str | None,
) -> tuple[Tree, list[jax.Array], list[Tree]]:
    """What the last layer returns, the extra losses of all layers, and the state of each layer afterwards."""
    extra: list[jax.Array] = []

    def to(dtype: str, tree: Tree, wanted: Callable[[int], bool]) -> Tree:
        def one(leaf: Any) -> Any:
            leaf = jnp.asarray(leaf)
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(dtype) if is_float and wanted(leaf.dtype.itemsize) else leaf

        return jax.tree.map(one, tree)

    after = list(states)
    if short is not None:
        x = to(short, x, lambda size: size >= 2)
    for index, layer in enumerate(entries):
        layer_key, owner = None if key is None else keys.layer_key(key, index), owners[index]
        with blame(f"layer {index} ({layer.name})", lambda given=x: f"it was given {describe(given)}"):
            x, aux = layer.apply(layers[owner], x, Context(layer_key, after[owner]), train)
        after[owner] = aux.state
        extra += aux.losses.values()
        if short is not None and index + 1 < len(entries):
            x = to(short, x, lambda size: size > 2)
    return (x if short is None else to("float32", x, lambda size: size < 4)), extra, after


def computed_dtypes(layers: Sequence[Params], short: str | None, float32_params: str | None) -> list[Any]:
    """For each array of the layers, in order, the dtype that it is computed with."""
    found = []
    for index, layer in enumerate(layers):
        for path, leaf in jax.tree_util.tree_flatten_with_path(layer)[0]:
            name = f"layer_{index:03d}/" + jax.tree_util.keystr(path, simple=True, separator="/")
            kept = float32_params is not None and re.search(float32_params, name) is not None
            casts = short is not None and not kept and leaf.dtype.itemsize >= 2
            found.append(jnp.dtype(short if casts and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype))
    return found
