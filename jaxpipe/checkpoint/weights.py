"""Weights as a safetensors file, for programs that do not know jaxpipe.

Names are stable: `layers.<global index>.<path in the layer's params>`, such as `layers.3.up.kernel`. Arrays have the shapes
that the layer's `init` gave them. A later use of a tied layer has no arrays. A dot in a key is written as %2E.

No other module imports safetensors. It is imported only when it is needed, because it is an optional dependency.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import merge
from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.checkpoint.merge import Weights, named, paths
from jaxpipe.checkpoint.safetensors_file import Writer, mapped
from jaxpipe.columns import listed
from jaxpipe.errors import CheckpointError
from jaxpipe.model.precision import as_rule
from jaxpipe.processes.group import Group, holders_of
from jaxpipe.types import Params


def save_weights(path: str | os.PathLike[str], engine_or_layers: Any, *, only: str | None = None) -> None:
    """Writes the params of each layer to a safetensors file. Readers see the old file or the whole new one.

    It takes one layer after the other from the devices, and one array after the other from the host to the disk. With
    several processes all of them call it, and the first one writes.

    Args:
      path: of the file; its folder must exist.
      engine_or_layers: an engine; or, for each layer, its own params, arrays in the shapes that the layer made, as
        `Pipeline.to_layers` and `Engine.to_layers` give them.
      only: a regular expression that is searched for in paths such as `layer_003/attn/qkv/kernel`: only these params are
        saved, and `load_weights` puts them into an engine or into other layers. None: all are.

    Raises:
      CheckpointError: the file cannot be written, or `only` is found in no path; raised on all processes.
      ConfigError: `only` is no regular expression.
      ImportError: safetensors is not installed.
    """
    group = Group.of(engine_or_layers.pipe.mesh) if _is_engine(engine_or_layers) else Group.everyone()
    source = group.together(lambda: _source(engine_or_layers, as_rule("only", only)))
    arrays = _arrays(source, group)
    error: Exception | None = None
    if group.first:
        try:
            _write(Path(path), source, arrays)
        except CheckpointError as caught:
            error = CheckpointError(f"{path}: the weights were not saved: {caught}")
            error.__cause__ = caught
        except Exception as caught:
            error = CheckpointError(f"{path}: the weights could not be written: {caught}.")
            error.__cause__ = caught
    # The others wait for the first one with each array, so it goes on to the end when it cannot write any more.
    if group.several:
        for _ in arrays:
            pass
    group.together(lambda: _raise(error))


@dataclass(frozen=True)
class _Source:
    """What is saved.

    Attributes:
      specs: by name, of all layers.
      only: which params are saved; None: all.
      num_layers: how many there are.
      layer: gives the params of a layer by its index.
      is_global: whether the arrays are known to be one and the same for all processes.
    """

    specs: dict[str, ArraySpec]
    only: str | None
    num_layers: int
    layer: Callable[[int], Params]
    is_global: bool


def _source(given: Any, only: str | None) -> _Source:
    _safetensors()
    if _is_engine(given):
        layout, params = given.pipe.layout, given.state.params
        shapes, layer = layout.layer_params, lambda index: layout.layer(params, index)
    elif isinstance(given, (list, tuple)):
        shapes, layer = given, lambda index: given[index]
    else:
        raise CheckpointError(
            f"layers is a {type(given).__name__}: expected a list with the params of each layer, as to_layers gives, or an "
            "engine."
        )
    specs = {name: _spec(leaf) for name, leaf in named(shapes, only=only).items()}
    if only is not None and not specs:
        raise CheckpointError(
            f"only={only!r} is found in the path of no param. The paths are {listed(paths(shapes), 8)}; it is searched for "
            "in these (re.search)."
        )
    return _Source(specs, only, len(shapes), layer, _is_engine(given))


def _is_engine(given: Any) -> bool:
    return hasattr(given, "pipe") and hasattr(given, "state")


def _spec(leaf: Any) -> ArraySpec:
    described = leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)
    return ArraySpec(np.dtype(described.dtype).name, tuple(described.shape))


def _arrays(source: _Source, group: Group) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each array, and on the first process the array, on the host."""
    first = group.members[:1]
    for index in range(source.num_layers):
        arrays = named([source.layer(index)], index, source.only)
        leaves = list(arrays.values())
        held = [holders_of(leaf) for leaf in leaves] if source.is_global else group.holders(leaves)
        for (name, leaf), holders in zip(arrays.items(), held, strict=True):
            yield name, np.asarray(group.fetch(leaf, holders, first))


def _write(path: Path, source: _Source, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    metadata = {"format": "jaxpipe", "num_layers": str(source.num_layers)}
    metadata |= {} if source.only is None else {"only": source.only}
    with folders.replacing(path) as draft:
        with Writer(draft, source.specs, metadata) as writer:
            for name, array in arrays:
                writer.write(name, array)
        _check_written(draft, source.specs)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _check_written(path: Path, arrays: dict[str, ArraySpec]) -> None:
    """Raises CheckpointError unless the file names these arrays with these shapes. No array is read."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # it is no mapping
    expected = {name: tuple(array.shape) for name, array in arrays.items()}
    if odd := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise CheckpointError(
            f"{odd[0]}: expected the shape {expected.get(odd[0])}, found {found.get(odd[0])} when reading the file back."
        )


def load_weights(path: str | os.PathLike[str], like: Any = None) -> list[Params]:
    """Reads a file that `save_weights` wrote.

    A file that was saved with `only` holds a part of the weights. It is merged into `like`, or comes by itself without.

    Args:
      path: of the file.
      like: for each layer, params (arrays or ShapeDtypeStruct) that have the structure, shapes and dtypes which the result
        must have: `engine.to_layers()`, or `[layer.params for layer in module.shapes(example_inputs)]`. Those that the file
        does not hold are taken from there, so they must be arrays. With None the result has nested dicts, which is right
        for flax modules. Or an engine, whose weights are replaced by those of the file; the state of its optimizer stays.
        With several processes all of them do that, with files of the same content.

    Returns:
      For each layer its own params as NumPy arrays, for `initialize(..., layers=...)` or `Pipeline.from_layers`. They are
      read from the file when they are used, so that each process reads what it needs. Until then the file may be removed
      or replaced, as `save_weights` does it, but not be overwritten in its place. With an engine, what the file holds.

    Raises:
      CheckpointError: the file is missing or damaged, `save_weights` did not write it, or it does not fit `like`, which is
        then unchanged.
      ImportError: safetensors is not installed.
    """
    if _is_engine(like):
        return merge.into_engine(path, lambda: _read(path), like)
    return merge.into_layers(path, _read(path), like)


def _read(path: str | os.PathLike[str]) -> Weights:
    """What a file holds."""
    _safetensors()
    try:
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        arrays = mapped(Path(path))
    except Exception as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found: {error}.") from error
    count = int(metadata["num_layers"]) if metadata.get("num_layers", "").isdigit() else None
    if metadata.get("format") != "jaxpipe" or count is None:
        raise CheckpointError(
            f"{path}: expected weights that jaxpipe.save_weights wrote, found names such as {sorted(arrays)[:3]}. For "
            "weights of other libraries see examples/evaluate_huggingface.py."
        )
    return Weights(arrays, count, "only" in metadata)


def _safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError("This needs the package safetensors: pip install 'jaxpipe[safetensors]'.") from error
