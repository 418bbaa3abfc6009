"""Describes what a checkpoint holds, as rows of text. It reads nothing but the manifest, and does not use JAX."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import manifest
from jaxpipe.checkpoint.manifest import ArraySpec, Manifest, size_of
from jaxpipe.errors import CheckpointError


class Report(NamedTuple):
    """The description of a checkpoint.

    Attributes:
      head: lines about the run.
      table: what the items hold; the first row holds the titles of the columns.
      foot: lines about the directory.
    """

    head: list[str]
    table: list[list[str]]
    foot: list[str]


def inspect(path: str | Path, tag: str | None = None) -> Report:
    """Describes a checkpoint.

    Args:
      path: the directory that `save_checkpoint` was given, or the folder of one checkpoint in it.
      tag: which checkpoint; by default the latest.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    directory = folders.as_directory(path)
    try:
        if tag is None and (directory / manifest.NAME).exists():
            directory, tag = directory.parent, directory.name
    except OSError as error:  # the name is too long, or the folder may not be read
        raise CheckpointError(f"{directory}: expected a checkpoint, found: {error}.") from error
    latest = folders.latest(directory)
    if tag is None:
        tag = latest
    if tag is None:
        known = folders.tags(directory)
        found = f"found the tags {', '.join(known)}: choose one with --tag" if known else "found none"
        raise CheckpointError(f"{directory}: expected a checkpoint, {found}.")
    folder = folders.find(directory, tag)
    made = manifest.read(folder)
    others = [f"{each} (latest)" if each == latest else each for each in folders.tags(directory)]
    return Report(_head(folder, made), _table(made), [f"tags in {directory}: {', '.join(others)}"])


def _head(folder: Path, made: Manifest) -> list[str]:
    seen = f"{made.micro_batches_seen:,} micro-batches of data seen"
    return [
        f"checkpoint  {folder}",
        f"saved       {made.saved_at}, step {made.step:,}, {seen}",
        f"versions    format {made.format}, {', '.join(f'{name} {version}' for name, version in made.versions.items())}",
        f"written by  {' x '.join(f'{axis} {size}' for axis, size in made.mesh.items())}, layers cut at {made.partition}",
        f"config      {', '.join(f'{name}={value}' for name, value in made.config.items() if value is not None)}",
        *([f"client      {made.client_state}"] if made.client_state else []),
    ]


def _table(made: Manifest) -> list[list[str]]:
    sizes = _bytes_per_item(made)
    rows = [["item", "layer", "parameters", "dtype", "optimizer state", "bytes"]]
    for index, layer in enumerate(made.layers):
        item = f"layer_{index:03d}"
        name = layer.name if layer.tied_to is None else f"{layer.name}, tied to layer {layer.tied_to}"
        rows.append([item if layer.arrays else "", f"{index} {name}", *_counts(layer.arrays), _size(sizes, item)])
    rows.append(["state", "", "", "", f"{sum(spec.size for spec in made.state.values()):,}", _size(sizes, "state")])
    kept = sum(size_of(layer.arrays, "opt_state") for layer in made.layers)
    rows.append(["total", "", f"{made.num_params:,}", "", f"{kept:,}", f"{sum(made.files.values()):,}"])
    return rows


def _counts(arrays: Mapping[str, ArraySpec]) -> list[str]:
    """Three cells: the number of parameters, their dtypes, and how many numbers the optimizer keeps about them."""
    params = size_of(arrays)
    if not arrays:
        return ["", "", ""]
    dtypes = sorted({spec.dtype for name, spec in arrays.items() if name.split("/")[0] == "params"})
    return [f"{params:,}", " ".join(dtypes), f"{size_of(arrays, 'opt_state'):,}"]


def _bytes_per_item(made: Manifest) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, size in made.files.items():
        item = name.split("/")[0]
        sizes[item] = sizes.get(item, 0) + size
    return sizes


def _size(sizes: Mapping[str, int], item: str) -> str:
    return f"{sizes[item]:,}" if item in sizes else ""
