"""Weights of a file, put into layers or into an engine: all of them, or a part, such as the adapters of a model."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpipe.checkpoint import items
from jaxpipe.errors import CheckpointError
from jaxpipe.layout.replace import replaced
from jaxpipe.model import identity
from jaxpipe.model.paths import layer_name, param_path
from jaxpipe.model.shapes import aval, describe
from jaxpipe.processes.group import Group
from jaxpipe.types import Params

Path = str | os.PathLike[str]


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: by name, such as `layers.3.up.kernel`.
      num_layers: of the model.
      is_part: whether it was asked to hold a part of the weights only.
    """

    arrays: dict[str, np.ndarray]
    num_layers: int
    is_part: bool


def named(layers: Sequence[Params], first: int = 0, only: str | None = None) -> dict[str, Any]:
    """The leaves of some layers by the names that they have in a file.

    Args:
      first: the index of the first layer.
      only: a regular expression, which is searched for in the paths of params; None: all are wanted.
    """
    leaves = jax.tree_util.tree_flatten_with_path(dict(enumerate(layers, first)))[0]
    return {
        f"layers.{items.joined(path, '.')}": leaf
        for path, leaf in leaves
        if only is None or re.search(only, param_path(layer_name(path[0].key), path[1:]))
    }


def paths(layers: Sequence[Params]) -> list[str]:
    """The paths of all params, such as `layer_003/up/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(enumerate(layers)))[0]
    return [param_path(layer_name(path[0].key), path[1:]) for path, _ in leaves]


def into_layers(path: Path, found: Weights, like: Sequence[Params] | None) -> list[Params]:
    """The params of each layer; see `jaxpipe.load_weights`.

    Raises:
      CheckpointError: the file does not fit.
    """
    if like is None:
        nested = items.nest(found.arrays, ".", items.unescaped).get("layers", {})
        return [nested.get(str(index), {}) for index in range(found.num_layers)]
    if not isinstance(like, (list, tuple)):
        raise CheckpointError(
            f"like is a {type(like).__name__}: expected a list with the params of each layer, as to_layers gives, or an "
            "engine."
        )
    wanted = named(like)
    _check(path, found, wanted, len(like))
    for name, leaf in wanted.items():
        if name not in found.arrays and isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"{path}: it holds a part of the weights only, and not {name}, of which `like` has the shape alone. Pass "
                "layers with arrays to merge it into."
            )
    leaves = [found.arrays.get(name, leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(list(like)), leaves)


def into_engine(path: Path, read: Callable[[], Weights], engine: Any) -> list[Params]:
    """Replaces weights of an engine; every process calls it.

    Returns:
      What the file holds, in the structure of the layers as far as it goes: nested dicts.

    Raises:
      CheckpointError: the file does not fit, or differs from that of another process; the engine is unchanged.
    """
    layout, mesh = engine.pipe.layout, engine.pipe.mesh
    group, wanted = Group.of(mesh), named(layout.layer_params)

    def checked() -> Weights:
        found = read()
        _check(path, found, wanted, len(layout.layer_params))
        return found

    found = group.together(checked)
    hashes = group.gather(identity.of_arrays(found.arrays))
    if len(set(hashes)) > 1:
        raise CheckpointError(
            f"{path}: the file is not the same on all processes. Put it where all of them read it, or copy it."
        )
    places = _places(layout.layer_params)
    arrays = {places[name]: array for name, array in found.arrays.items()}
    params = replaced(layout, mesh, engine.state.params, arrays)
    engine.state = dataclasses.replace(engine.state, params=params)
    return into_layers(path, found, None)


def _places(layers: Sequence[Params]) -> dict[str, tuple[int, int]]:
    """The layer of each array, by its name, and its number among the leaves of the layer."""
    return {
        name: (index, number) for index, layer in enumerate(layers) for number, name in enumerate(named([layer], index))
    }


def _check(path: Path, found: Weights, wanted: Mapping[str, Any], num_layers: int) -> None:
    """Raises CheckpointError unless a file has what is wanted, or a part of it if it is one."""
    odd = sorted(found.arrays.keys() - wanted.keys() if found.is_part else found.arrays.keys() ^ wanted.keys())
    if found.num_layers != num_layers or odd:
        which = "the file" if found.is_part else "one of both"
        raise CheckpointError(
            f"{path}: expected the arrays of {num_layers} layers, found those of {found.num_layers}; only {which} has "
            f"{odd[:4]}."
        )
    for name, leaf in wanted.items():
        if name in found.arrays and aval(leaf) != aval(found.arrays[name]):
            raise CheckpointError(f"{path}: {name}: expected {describe(leaf)}, found {describe(found.arrays[name])}.")
