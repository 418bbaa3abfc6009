"""Reads items of a checkpoint, and makes sure that they are all of one and the same checkpoint."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest
from jaxpipe.checkpoint.compare import Wanted
from jaxpipe.checkpoint.manifest import ArraySpec, Manifest
from jaxpipe.errors import CheckpointError
from jaxpipe.processes.group import Group

Result = TypeVar("Result")
TRIES = 5
PAUSE = 1.0  # seconds between two tries of several processes
log = logging.getLogger(__name__)


def with_checkpoint(
    directory: Path, tag: str | None, use: Callable[[Path, Manifest], Result], group: Group | None = None
) -> Result | None:
    """Returns `use(folder, manifest)` for the checkpoint of a tag, or for the latest one.

    A writer may remove or replace a checkpoint while it is being read. Then the reading starts again, so that what is read
    is always one whole checkpoint.

    Args:
      group: processes that read together, with the same arguments: all of them one and the same checkpoint, or none.

    Returns:
      What `use` returned; None if there is no `latest`.

    Raises:
      CheckpointError: `use` raised it, there is no such tag, or the checkpoint was replaced again and again. With a group
        it is raised on all processes, whatever went wrong on one.
    """
    group = Group(tuple(jax.local_devices()[:1])) if group is None else group
    for attempt in range(TRIES):
        chosen = _choose(directory, tag, group)
        if chosen is None:
            return None
        begun_with, error, found = None, None, None
        try:
            path = folders.find(directory, chosen)
            made = manifest.read(path)
            begun_with = path, made.id
            found = use(path, made)
        except Exception as caught:
            error = caught
        seen = _Seen(
            None if begun_with is None else begun_with[1],
            replaced=_identity(directory, chosen) != begun_with,
            moved_on=tag is None and _moved_on(directory, chosen),
            failed=error is not None,
        )
        all_seen = [_Seen(*each) for each in group.gather(list(seen))]
        replaced = any(each.replaced or each.id != seen.id for each in all_seen)
        failed = any(each.failed for each in all_seen)
        if not failed and not replaced:
            return found
        # A process that finds nothing may be on another file system, where nothing will ever be found.
        if failed and (group.several and attempt == TRIES - 1 or not (replaced or all_seen[0].moved_on)):
            group.together(functools.partial(_raise, error))
        log.info("%s: %s was replaced while it was read (attempt %d)", directory, chosen, attempt + 1)
        if group.several:
            time.sleep(PAUSE)  # a network file system may go on showing the former one for a while
    raise CheckpointError(
        f"{directory}: expected a checkpoint that stays for as long as it takes to read, found {TRIES} that did not."
    )


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


class _Seen(NamedTuple):
    """What one process has seen of a checkpoint: its id, and whether it was replaced, `latest` moved on, reading failed."""

    id: str | None
    replaced: bool
    moved_on: bool
    failed: bool


def _choose(directory: Path, tag: str | None, group: Group) -> str | None:
    """The tag that all processes read: the one asked for, or the one that the first process finds in `latest`."""

    def choose() -> str | None:
        return folders.check_tag(tag) if tag is not None else folders.latest(directory) if group.first else None

    return group.broadcast(group.together(choose))


def _identity(directory: Path, tag: str) -> tuple[Path, str] | None:
    """A value that changes when the checkpoint of a tag is replaced; None if there is none that can be read."""
    try:
        path = folders.find(directory, tag)
        return path, manifest.read(path).id
    except CheckpointError:
        return None


def _moved_on(directory: Path, tag: str) -> bool:
    try:
        return folders.latest(directory) != tag
    except CheckpointError:
        return True


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
