"""Reads checkpoints. Everything is found, compared and read before any part of the present state is touched."""

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest
from jaxpipe.checkpoint.assembly import Assembly
from jaxpipe.checkpoint.compare import Selection, check_key, wanted_arrays
from jaxpipe.checkpoint.homes import PARAMS, Homes, layer_item
from jaxpipe.checkpoint.manifest import Manifest
from jaxpipe.checkpoint.read import read_items, with_checkpoint
from jaxpipe.checkpoint.request import agree, check_flags
from jaxpipe.errors import CheckpointError
from jaxpipe.processes.group import Group
from jaxpipe.training.state import TrainState
from jaxpipe.types import Params


class Loaded(NamedTuple):
    """A checkpoint in memory.

    Attributes:
      path: its folder.
      manifest: what was written about it.
      state: its arrays on the host, those that this process needs.
      warning: what does not fit the model, if loading is not strict.
    """

    path: Path
    manifest: Manifest
    state: Assembly
    warning: str | None


def load(
    directory: str | os.PathLike[str],
    tag: str | None,
    homes: Homes,
    state: TrainState,
    shardings: TrainState,
    selection: Selection,
) -> Loaded | None:
    """Reads a checkpoint into the memory of the host. Every process calls it, and reads what its devices hold.

    Args:
      tag: None is the latest one.
      state: the present state, which is not changed.
      shardings: of the state, one per leaf.

    Returns:
      The checkpoint; or None, with a warning, if the directory does not exist or has no `latest`.

    Raises:
      CheckpointError: it is damaged, or belongs to another model. The message has the path, what was expected and what was
        found. If one process raises, all do.
    """
    group = homes.shares.group

    def check() -> Path:
        flags = ("load_module_strict", "load_optimizer_states", "load_module_only")
        check_flags(dict(zip(flags, selection, strict=True)))
        return folders.as_directory(directory)

    folder = group.together(check)
    agree(group, "load_checkpoint", {"directory": folder, "tag": tag, "(strict, optimizer, only)": tuple(selection)})

    def once(path: Path, made: Manifest) -> Loaded:
        wanted, warning = wanted_arrays(path, made, homes.expected(state), selection, homes.frozen())
        if not selection.module_only:
            check_key(path, made, state)
        assembly = Assembly(homes.of_leaves, state, shardings, wanted)
        needed = homes.needed()
        for item, arrays in read_items(path, made, {item: wanted[item] for item in wanted if item in needed}):
            assembly.put(item, arrays)
            del arrays  # before the next item is read
        return Loaded(path, made, assembly, warning)

    found = with_checkpoint(folder, tag, once, group)
    warning = _nothing(folder) if found is None else found.warning
    if warning and group.first:
        warnings.warn(warning, stacklevel=3)
    return found


def place(found: Loaded, state: TrainState, homes: Homes) -> tuple[TrainState, CheckpointError | None]:
    """Puts a checkpoint on the devices, in the place of a state, which is used up. Every process calls it.

    Returns:
      The new state, and None; if something goes wrong on the way, on this process or on another one, what there is then,
      and the error.
    """
    made, error = found.state.place(state)

    def raise_error() -> None:
        if error is not None:
            raise CheckpointError(
                f"{found.path}: it was read, but could not be put on the devices ({type(error).__name__}: {error}). Part "
                "of the engine's state is new and part is old: load again before going on."
            ) from error

    try:
        homes.shares.group.together(raise_error)
    except CheckpointError as told:
        return made, told
    return made, None


def _nothing(directory: Path) -> str:
    """The warning if there is nothing to load."""
    known = folders.tags(directory)
    if known:
        what = f"no file 'latest'; pass one of the tags {', '.join(known)}"
    else:
        what = "no checkpoint" if directory.is_dir() else "no such directory"
    return f"{directory}: {what}. Nothing was loaded."


def restore_data(data_iter: Any, found: Loaded, group: Group) -> None:
    """Sets a data iterator, if there is one, to where it stood when the checkpoint was saved. Every process calls it.

    Raises:
      CheckpointError: the iterator cannot be set, or the checkpoint does not have its state. If one process raises, all do.
    """
    made = found.manifest

    def restore() -> None:
        if data_iter is None:
            return
        if not hasattr(data_iter, "set_state"):
            raise CheckpointError(f"data_iter is a {type(data_iter).__name__} without set_state(): leave it out.")
        states, skip = made.data_states, f"Skip {made.micro_batches_seen} micro-batches instead (itertools.islice)."
        if states is not None and len(states) != len(group.members):
            raise CheckpointError(
                f"{found.path}: it has the states of the data iterators of {len(states)} processes, which stood at "
                f"different places: expected as many processes, found {len(group.members)}, and nobody can say what each "
                f"of them has read. Leave data_iter out. {skip}"
            )
        if states is None and made.data_state is None:
            raise CheckpointError(
                f"{found.path}: expected the state of a data iterator, found none: it was saved without data_iter. {skip}"
            )
        mine = made.data_state if states is None else states[group.members.index(group.me)]
        data_iter.set_state(manifest.decode_data_state(mine))

    group.together(restore)


# ------------------------------------------------------------------------------------------------------------ one layer


def load_layer(directory: str | Path, tag: str | None, index: int) -> Params:
    """Reads the params of one layer, and nothing else of the checkpoint.

    Args:
      directory: as it was given to `Engine.save_checkpoint`.
      tag: the same; None is the latest one.
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
