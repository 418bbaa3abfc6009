"""Reads checkpoints: everything is found, compared and read before anything of the present state is touched."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest
from jaxpipe.checkpoint.homes import OPT_STATE, PARAMS, Assembly, Homes, layer_item
from jaxpipe.checkpoint.manifest import ArraySpec, Manifest
from jaxpipe.checkpoint.verify import stored
from jaxpipe.errors import CheckpointError
from jaxpipe.training.state import TrainState

Wanted = Mapping[str, Mapping[str, ArraySpec]]
TRIES = 5
log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A checkpoint in memory: its folder, its manifest, and the state on the host."""

    path: Path
    manifest: Manifest
    state: Assembly


class Selection(NamedTuple):
    """What to load: see `Engine.load_checkpoint`."""

    strict: bool
    optimizer: bool
    module_only: bool

    def takes(self, name: str) -> bool:
        """Whether an array, by its name, is asked for."""
        head = name.split("/")[0]
        if head == PARAMS:
            return True
        return not self.module_only and (head != OPT_STATE or self.optimizer)


def load(directory: Path, tag: str | None, homes: Homes, state: TrainState, selection: Selection) -> Loaded | None:
    """The state of a checkpoint, or None (and a warning) if there is no directory or no `latest` in it.

    Raises:
      CheckpointError: it is damaged, or of another model; with path, what was expected and what was found.
    """

    flags = ("load_module_strict", "load_optimizer_states", "load_module_only")
    for flag, value in zip(flags, selection, strict=True):
        if not isinstance(value, bool):
            raise CheckpointError(f"{flag}={value!r}: expected True or False.")

    def once(path: Path, made: Manifest) -> Loaded:
        wanted = _wanted(path, made, homes.expected(state), selection)
        if not selection.module_only:
            _check_key(path, made, state)
        assembly = homes.assembly(state, wanted)
        for item, arrays in read_items(path, made, wanted):
            assembly.put(item, arrays)
            del arrays  # before the next item is read
        return Loaded(path, made, assembly)

    found = with_checkpoint(directory, tag, once)
    if found is None:
        _warn_none(directory)
    return found


def with_checkpoint(directory: Path, tag: str | None, use: Callable[[Path, Manifest], Any]) -> Any:
    """`use(folder, manifest)` of a tag, or of the latest one; None if there is no `latest`.

    A writer may remove or replace a checkpoint while it is being read. Then it is looked for again, so that what is read is
    always one whole checkpoint.
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
    """What changes when the checkpoint of a tag is replaced; None while there is none that can be read."""
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
    """Reads the wanted arrays item after item, and compares what comes with what the manifest promises."""
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
    """Raises CheckpointError if a file of an item is not there or was cut short."""
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


# ------------------------------------------------------------------------------------------------------------ comparing


def _wanted(path: Path, made: Manifest, expected: Wanted, selection: Selection) -> Wanted:
    """What to read of each item: all that the model expects, if the checkpoint has just that."""
    there = stored(made)
    names = {layer_item(index): layer.name for index, layer in enumerate(made.layers)}
    wanted: dict[str, dict[str, ArraySpec]] = {}
    missing: list[_Odd] = []
    extra: list[_Odd] = []
    for item in sorted(there.keys() | expected.keys()):
        title = f"{item} ({names[item]})" if item in names else item
        mine = {name: spec for name, spec in expected.get(item, {}).items() if selection.takes(name)}
        theirs = {name: spec for name, spec in there.get(item, {}).items() if selection.takes(name)}
        for name in mine:
            if name in theirs and mine[name] != theirs[name]:
                raise CheckpointError(
                    f"{path / item}: {title} {name}: expected {mine[name]}, found {theirs[name]}. The checkpoint is of a "
                    "model with other shapes or dtypes."
                )
        missing += [_Odd(title, name, mine[name]) for name in mine if name not in theirs]
        extra += [_Odd(title, name, theirs[name]) for name in theirs if name not in mine]
        wanted[item] = {name: spec for name, spec in theirs.items() if name in mine}
    if missing or extra:
        _misfit(path, missing, extra, selection)
    if selection.strict and (unlisted := sorted(p.name for p in path.glob("layer_*") if p.name not in there)):
        raise CheckpointError(
            f"{path}: expected the items of {len(made.layers)} layers, as its manifest says, found {', '.join(unlisted)} "
            "beside them. Remove what does not belong there, or pass load_module_strict=False."
        )
    return wanted


class _Odd(NamedTuple):
    """An array that only the model or only the checkpoint has."""

    item: str
    name: str
    spec: ArraySpec


def _misfit(path: Path, missing: list[_Odd], extra: list[_Odd], selection: Selection) -> None:
    found = "; ".join(
        f"{what} {_some(arrays)}" for what, arrays in (("it lacks", missing), ("it also has", extra)) if arrays
    )
    if not selection.strict:
        warnings.warn(f"{path} does not fit the model: {found}. The rest was loaded.", stacklevel=7)
        return
    optimizer = all(odd.name.split("/")[0] == OPT_STATE for odd in missing + extra)
    what, way_out = (
        ("optimizer", "Use the optimizer that wrote it, or pass load_optimizer_states=False.")
        if optimizer
        else ("model", "Load it into the model that wrote it, or pass load_module_strict=False to load what fits.")
    )
    raise CheckpointError(f"{path}: expected the arrays of this {what}, found others: {found}. {way_out}")


def _some(arrays: list[_Odd], most: int = 4) -> str:
    more = f" and {len(arrays) - most} more" if len(arrays) > most else ""
    return ", ".join(f"{odd.item} {odd.name} {odd.spec}" for odd in arrays[:most]) + more


def _check_key(path: Path, made: Manifest, state: TrainState) -> None:
    typed = jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    mine = str(jax.random.key_impl(state.key)) if typed else None
    if mine != made.key_impl:
        raise CheckpointError(
            f"{path}: expected a PRNG key of kind {mine or 'uint32'}, found {made.key_impl or 'uint32'}. Pass such a key "
            "to jaxpipe.initialize, or load_module_only=True."
        )


def restore_data(data_iter: Any, found: Loaded) -> None:
    """Sets a data iterator to where it stood."""
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


def load_layer(directory: str | Path, tag: str | None, index: int) -> Any:
    """Reads the params of one layer, and nothing else of the checkpoint.

    Args:
      directory, tag: of `Engine.save_checkpoint`; tag None is the latest one.
      index: global index of the layer.

    Returns:
      Its params, a nested dict of numpy arrays; `{}` if it has none or is a later use of a tie. (A layer whose `init`
      returns something else than nested dicts comes as nested dicts, too, with indices as strings.)

    Raises:
      CheckpointError: there is no such checkpoint or layer, or it is damaged.
    """

    def once(path: Path, made: Manifest) -> Any:
        if isinstance(index, bool) or not hasattr(index, "__index__") or not 0 <= index < len(made.layers):
            raise CheckpointError(f"{path}: expected a layer index from 0 to {len(made.layers) - 1}, found {index!r}.")
        specs = {n: s for n, s in made.layers[index].arrays.items() if n.split("/")[0] == PARAMS}
        found = dict(read_items(path, made, {layer_item(index): specs}))
        return items.nest(found.get(layer_item(index), {}), key=items.unescaped).get(PARAMS, {})

    found = with_checkpoint(folders.as_directory(directory), tag, once)
    if found is None:
        raise CheckpointError(f"{directory}: expected a checkpoint, found none.")
    return found
