"""Reads checkpoints. Everything is found, compared and read before any part of the present state is touched."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest
from jaxpipe.checkpoint.compare import Selection, Wanted, check_key, wanted_arrays
from jaxpipe.checkpoint.homes import PARAMS, Assembly, Homes, layer_item
from jaxpipe.checkpoint.manifest import ArraySpec, Manifest
from jaxpipe.errors import CheckpointError
from jaxpipe.training.state import TrainState
from jaxpipe.types import Params

Result = TypeVar("Result")
TRIES = 5
log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A checkpoint in memory.

    Attributes:
      path: its folder.
      manifest: what was written about it.
      state: its arrays, on the host.
    """

    path: Path
    manifest: Manifest
    state: Assembly


def load(directory: Path, tag: str | None, homes: Homes, state: TrainState, selection: Selection) -> Loaded | None:
    """Reads a checkpoint into the memory of the host.

    Args:
      tag: None is the latest one.
      state: the present state, which is not changed.

    Returns:
      The checkpoint; or None, with a warning, if the directory does not exist or has no `latest`.

    Raises:
      CheckpointError: it is damaged, or belongs to another model. The message has the path, what was expected and what was
        found.
    """

    flags = ("load_module_strict", "load_optimizer_states", "load_module_only")
    for flag, value in zip(flags, selection, strict=True):
        if not isinstance(value, bool):
            raise CheckpointError(f"{flag}={value!r}: expected True or False.")

    def once(path: Path, made: Manifest) -> Loaded:
        wanted = wanted_arrays(path, made, homes.expected(state), selection)
        if not selection.module_only:
            check_key(path, made, state)
        assembly = homes.assembly(state, wanted)
        for item, arrays in read_items(path, made, wanted):
            assembly.put(item, arrays)
            del arrays  # before the next item is read
        return Loaded(path, made, assembly)

    found = with_checkpoint(directory, tag, once)
    if found is None:
        _warn_none(directory)
    return found


def with_checkpoint(directory: Path, tag: str | None, use: Callable[[Path, Manifest], Result]) -> Result | None:
    """Returns `use(folder, manifest)` for the checkpoint of a tag, or for the latest one.

    A writer may remove or replace a checkpoint while it is being read. Then the reading starts again, so that what is read
    is always one whole checkpoint.

    Returns:
      What `use` returned; None if there is no `latest`.

    Raises:
      CheckpointError: `use` raised it, there is no such tag, or the checkpoint was replaced again and again.
    """
    for attempt in range(TRIES):
        chosen = folders.latest(directory) if tag is None else folders.check_tag(tag)
        if chosen is None:
            return None
        begun_with, error, found = None, None, None
        try:
            path = folders.find(directory, chosen)
            made = manifest.read(path)
            begun_with = path, made.id
            found = use(path, made)
        except CheckpointError as caught:
            error = caught
        replaced = _identity(directory, chosen) != begun_with
        moved_on = tag is None and folders.latest(directory) != chosen
        if error is None and not replaced:
            return found
        if error is not None and not (replaced or moved_on):
            raise error
        log.info("%s: %s was replaced while it was read (attempt %d)", directory, chosen, attempt + 1)
    raise CheckpointError(
        f"{directory}: expected a checkpoint that stays for as long as it takes to read, found {TRIES} that did not."
    )


def _identity(directory: Path, tag: str) -> tuple[Path, str] | None:
    """A value that changes when the checkpoint of a tag is replaced; None if there is none that can be read."""
    try:
        path = folders.find(directory, tag)
        return path, manifest.read(path).id
    except CheckpointError:
        return None


def _warn_none(directory: Path) -> None:
    known = folders.tags(directory)
    if known:
        what = f"no file 'latest'; pass one of the tags {', '.join(known)}"
    else:
        what = "no checkpoint" if directory.is_dir() else "no such directory"
    warnings.warn(f"{directory}: {what}. Nothing was loaded.", stacklevel=4)


def read_items(path: Path, made: Manifest, wanted: Wanted) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (item, arrays on the host) for one item after the other, with the wanted arrays only.

    Raises:
      CheckpointError: an array or a file is not what the manifest says.
    """
    wanted = {item: specs for item, specs in wanted.items() if specs}
    for item in wanted:
        _check_files(path, item, made)
    for item, specs in wanted.items():
        there = path / item
        try:
            arrays = items.read(there, specs.__contains__)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and tensorstore have many kinds
            text = str(error).strip().splitlines() or ["no message"]
            raise CheckpointError(
                f"{there}: expected {len(specs)} arrays, found damaged files: {type(error).__name__}: {text[0][:300]}. "
                "Load another tag."
            ) from error
        for name, spec in specs.items():
            if not spec.size:
                arrays[name] = np.empty(spec.shape, spec.dtype)
            if name not in arrays:
                raise CheckpointError(f"{there}: expected the array {name}, {spec}, found {sorted(arrays)}.")
            is_there = ArraySpec(str(arrays[name].dtype), arrays[name].shape)
            if is_there != spec:
                raise CheckpointError(f"{there}: {name}: expected {spec}, found {is_there}.")
        yield item, arrays
        del arrays


def _check_files(path: Path, item: str, made: Manifest) -> None:
    """Raises CheckpointError if a file of an item is missing or was cut short."""
    if not (path / item).is_dir():
        raise CheckpointError(f"{path / item}: expected the item {item}, found nothing. Load another tag.")
    for name, size in made.files.items():
        if name.startswith(f"{item}/"):
            try:
                there = (path / name).stat().st_size
            except OSError:
                there = None
            if there != size:
                found = "no such file" if there is None else f"{there} bytes"
                raise CheckpointError(f"{path / name}: expected {size} bytes, found {found}. Load another tag.")


def restore_data(data_iter: Any, found: Loaded) -> None:
    """Sets a data iterator, if there is one, to where it stood when the checkpoint was saved.

    Raises:
      CheckpointError: the iterator cannot be set, or the checkpoint does not have its state.
    """
    if data_iter is None:
        return
    if not hasattr(data_iter, "set_state"):
        raise CheckpointError(f"data_iter is a {type(data_iter).__name__} without set_state(): leave it out.")
    if found.manifest.data_state is None:
        raise CheckpointError(
            f"{found.path}: expected the state of a data iterator, found none: it was saved without data_iter. Skip "
            f"{found.manifest.micro_batches_seen} micro-batches instead (itertools.islice)."
        )
    data_iter.set_state(manifest.decode_data_state(found.manifest.data_state))


# ------------------------------------------------------------------------------------------------------------ one layer


def load_layer(directory: str | Path, tag: str | None, index: int) -> Params:
    """Reads the params of one layer, and nothing else of the checkpoint.

    Args:
      directory, tag: as they were given to `Engine.save_checkpoint`; the tag None is the latest one.
      index: global index of the layer.

    Returns:
      Its params as nested dicts of NumPy arrays, in the shapes and dtypes that the layer made; `{}` if it has no params,
      or is a later use of a tied layer. A layer whose `init` returns other containers than dicts comes as nested dicts
      too, with indices as strings.

    Raises:
      CheckpointError: there is no such checkpoint or layer, or it is damaged.
    """

    def once(path: Path, made: Manifest) -> Params:
        if isinstance(index, bool) or not hasattr(index, "__index__") or not 0 <= index < len(made.layers):
            raise CheckpointError(f"{path}: expected a layer index from 0 to {len(made.layers) - 1}, found {index!r}.")
        specs = {n: s for n, s in made.layers[index].arrays.items() if n.split("/")[0] == PARAMS}
        found = dict(read_items(path, made, {layer_item(index): specs}))
        return items.nest(found.get(layer_item(index), {}), key=items.unescaped).get(PARAMS, {})

    found = with_checkpoint(folders.as_directory(directory), tag, once)
    if found is None:
        raise CheckpointError(f"{directory}: expected a checkpoint, found none.")
    return found
