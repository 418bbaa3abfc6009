"""Weights as a safetensors file, for programs that do not know jaxpipe.

Names are stable: `layers.<global index>.<path in the layer's params>`, such as `layers.3.up.kernel`. Arrays have the shapes
that the layer's `init` gave them. A later use of a tied layer has no arrays. A dot in a key is written as %2E.

No other module imports safetensors. It is imported only when it is needed, because it is an optional dependency.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items
from jaxpipe.errors import CheckpointError
from jaxpipe.model.shapes import aval, describe
from jaxpipe.types import Params


def save_weights(path: str | os.PathLike[str], layers: Sequence[Params]) -> None:
    """Writes the params of each layer to a safetensors file. Readers see the old file or the whole new one.

    Args:
      path: of the file; its folder must exist.
      layers: for each layer its own params, arrays in the shapes that the layer made, as `Pipeline.to_layers` and
        `Engine.to_layers` give them.

    Raises:
      CheckpointError: the file cannot be written.
      ImportError: safetensors is not installed.
    """
    if not isinstance(layers, (list, tuple)):
        raise CheckpointError(
            f"layers is a {type(layers).__name__}: expected a list with the params of each layer, as to_layers gives."
        )
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named(layers).items()}
    try:
        with folders.replacing(Path(path)) as draft:
            _safetensors().save_file(arrays, draft, metadata={"format": "jaxpipe", "num_layers": str(len(layers))})
            _check_written(draft, arrays)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: the weights were not saved: {error}") from error
    except Exception as error:  # the library raises an exception of its own when a disk is full
        raise CheckpointError(f"{path}: the weights could not be written: {error}.") from error


def _check_written(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises CheckpointError unless the file names these arrays with these shapes. No array is read."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # it is no mapping
    expected = {name: array.shape for name, array in arrays.items()}
    if odd := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise CheckpointError(
            f"{odd[0]}: expected the shape {expected.get(odd[0])}, found {found.get(odd[0])} when reading the file back."
        )


def load_weights(path: str | os.PathLike[str], like: Sequence[Params] | None = None) -> list[Params]:
    """Reads a file that `save_weights` wrote.

    Args:
      path: of the file.
      like: for each layer, params (arrays or ShapeDtypeStruct) that have the structure, shapes and dtypes which the result
        must have: `engine.to_layers()`, or `[layer.params for layer in module.shapes(example_inputs)]`. With None the
        result has nested dicts, which is right for flax modules.

    Returns:
      For each layer its own params as NumPy arrays, for `initialize(..., layers=...)` or `Pipeline.from_layers`.

    Raises:
      CheckpointError: the file is missing or damaged, `save_weights` did not write it, or it does not fit `like`.
      ImportError: safetensors is not installed.
    """
    library = _safetensors()
    try:
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        arrays = library.load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found: {error}.") from error
    count = int(metadata["num_layers"]) if metadata.get("num_layers", "").isdigit() else None
    if metadata.get("format") != "jaxpipe" or count is None:
        raise CheckpointError(
            f"{path}: expected weights that jaxpipe.save_weights wrote, found names such as {sorted(arrays)[:3]}. For "
            "weights of other libraries see examples/evaluate_huggingface.py."
        )
    if like is None:
        nested = items.nest(arrays, ".", items.unescaped).get("layers", {})
        return [nested.get(str(index), {}) for index in range(count)]
    wanted = _named(like)
    odd = sorted(wanted.keys() ^ arrays.keys())
    if len(like) != count or odd:
        raise CheckpointError(
            f"{path}: expected the arrays of {len(like)} layers, found those of {count}; only one of both has {odd[:4]}."
        )
    for name, leaf in wanted.items():
        if aval(leaf) != aval(arrays[name]):
            raise CheckpointError(f"{path}: {name}: expected {describe(leaf)}, found {describe(arrays[name])}.")
    return jax.tree.unflatten(jax.tree.structure(list(like)), [arrays[name] for name in wanted])


def _named(layers: Sequence[Params]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(list(layers))[0]
    return {f"layers.{items.joined(path, '.')}": leaf for path, leaf in leaves}


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("This needs the package safetensors: pip install 'jaxpipe[safetensors]'.") from error
    return safetensors.numpy
