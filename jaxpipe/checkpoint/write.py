"""Writes one checkpoint from one process, and what writing with several processes shares with that."""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest, verify
from jaxpipe.checkpoint.items import Arrays
from jaxpipe.checkpoint.manifest import Manifest
from jaxpipe.errors import CheckpointError

Source = Iterable[tuple[str, Arrays]]  # (item, arrays); the next item is asked for when the one before is on the disk


class Order(NamedTuple):
    """A checkpoint that is to be written; see `Engine.save_checkpoint`."""

    directory: Path
    tag: str
    save_latest: bool
    keep: int | None
    blocking: bool

    @property
    def target(self) -> Path:
        """The folder that the checkpoint will have."""
        return self.directory / self.tag


def write(order: Order, made: Manifest, source: Source) -> Path:
    """Writes a checkpoint.

    The items are written first, then the manifest, and both are looked at on the disk. Only then the folder gets its name,
    and at last `latest` names it.

    Args:
      made: the manifest, without `files`.

    Returns:
      The folder of the checkpoint.

    Raises:
      CheckpointError: it could not be written.
    """
    try:
        with (draft := folders.Draft(order.directory, order.tag)) as path:
            for name, arrays in source:
                items.write(path / name, arrays)
                del arrays  # before the next one is made
            written = complete(draft, made, files_in(path))
    except CheckpointError:
        raise
    except Exception as error:
        raise as_checkpoint_error(error, order.target) from error
    publish(order)
    return written


def files_in(path: Path, inside: Collection[str] | None = None) -> dict[str, int]:
    """The size of every file in a draft, or in some of its folders only, by its path in the draft."""
    roots = [path] if inside is None else [path / name for name in inside]
    found = [file for root in roots for file in root.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.stat().st_size for file in found}


def complete(draft: folders.Draft, made: Manifest, files: dict[str, int]) -> Path:
    """Writes the manifest of a draft whose items are there, looks at all of it, and gives it its name."""
    folders.write_text(draft.path / manifest.NAME, dataclasses.replace(made, files=files).to_json())
    verify.check_written(draft.path, made, draft.directory / draft.tag)
    return draft.commit()


def publish(order: Order) -> None:
    """Does what is left to do when a checkpoint has its name: `latest`, and older checkpoints."""
    try:
        if order.save_latest:
            folders.point_latest(order.directory, order.tag)
        if order.keep is not None:
            folders.prune(order.directory, order.keep)
    except OSError as error:
        raise CheckpointError(
            f"{order.target}: the checkpoint was written, but 'latest' or the older ones could not be changed: {error}."
        ) from error


def as_checkpoint_error(error: BaseException, target: Path) -> CheckpointError:
    """What a save raises for an error of any kind; Orbax and tensorstore raise many kinds when a disk is full."""
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(
        f"{target}: the checkpoint could not be written: {type(error).__name__}: {_reason(error)} Earlier "
        "checkpoints and the state of training are as they were."
    )


def _reason(error: BaseException) -> str:
    """The most helpful line of an error: what the operating system said, if it said something."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = str(error).strip()
    if "shutdown" in text:  # Orbax needs new threads, but Python does not start any at its end
        return "The program ended meanwhile: call engine.wait_for_checkpoint() before its end."
    for known in ("No space left on device", "Read-only file system", "Permission denied", "File too large"):
        if known in text:
            return f"{known}. Make room, or save somewhere else."
    return f"{text.splitlines()[0][:300]}." if text else "no message."
