"""A directory of checkpoints: tags, `latest`, and how writing one is all or nothing. Files only, no JAX.

    <directory>/latest            text: a tag
    <directory>/<tag>/            complete as soon as it has this name
    <directory>/.new.<writer>     being written
    <directory>/.replaced/<tag>   the former checkpoint of that tag, while the new one takes its place

A writer that dies leaves hidden folders, which the next writer removes. If it dies between the two renames that replace
a tag, readers find the former one.
"""

import contextlib
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxpipe.checkpoint import manifest
from jaxpipe.errors import CheckpointError
from jaxpipe.training.checks import did_you_mean

LATEST = "latest"
REPLACED = ".replaced"
_counter = itertools.count()


def as_directory(directory: str | os.PathLike[str]) -> Path:
    """The path, absolute; raises CheckpointError for what is none of a mounted file system."""
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
        raise CheckpointError(f"directory={directory!r}: expected the path of a folder.")
    if "://" in os.fspath(directory):
        raise CheckpointError(
            f"directory={os.fspath(directory)!r}: expected a path of a mounted file system. Mount the bucket, or copy the "
            "checkpoint."
        )
    return Path(directory).absolute()


def check_tag(tag: str) -> str:
    """Raises CheckpointError unless a tag can be the name of a folder here."""
    if not isinstance(tag, str) or not tag or tag.startswith(".") or tag == LATEST or {"/", os.sep, "\0"} & set(tag):
        raise CheckpointError(
            f"tag={tag!r}: expected the name of a folder, such as 'global_step100': no '/', no dot in front, and not "
            f"{LATEST!r}."
        )
    return tag


def tags(directory: Path) -> list[str]:
    """The tags of all complete checkpoints, the oldest first."""
    if not directory.is_dir():
        return []
    found: dict[str, int] = {}
    for path in [*directory.glob(f"{REPLACED}/*/{manifest.NAME}"), *directory.glob(f"*/{manifest.NAME}")]:
        try:
            if not path.parent.name.startswith("."):
                found[path.parent.name] = path.stat().st_mtime_ns
        except FileNotFoundError:  # removed meanwhile
            continue
    return sorted(found, key=lambda tag: (found[tag], tag))


def latest(directory: Path) -> str | None:
    """The tag that `latest` names, or None if there is no such file."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / LATEST}: expected a tag, found: {error}.") from error


def find(directory: Path, tag: str) -> Path:
    """The folder of a tag.

    Raises:
      CheckpointError: there is none; the tags that there are are named.
    """
    # The second one: its writer may have died while it replaced the tag.
    for path in (directory / tag, directory / REPLACED / tag):
        if path.exists():
            return path
    known = tags(directory)
    there = f"found {', '.join(known)}" if known else "found no checkpoint at all"
    raise CheckpointError(f"{directory}: expected the tag {tag!r}, {there}.{did_you_mean(tag, known)}")


def identity(directory: Path, tag: str) -> tuple[Path, int] | None:
    """What changes when the checkpoint of a tag is replaced; None while there is none."""
    try:
        path = find(directory, tag)
        return path, path.stat().st_ino
    except (CheckpointError, FileNotFoundError):
        return None


class Draft:
    """A checkpoint being written; `with Draft(...) as path:` and then `commit`. Without a commit nothing is left."""

    def __init__(self, directory: Path, tag: str):
        self.directory, self.tag = directory, tag
        self.path = _hidden(directory)

    def __enter__(self) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        _clean(self.directory)
        self.path.mkdir()
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> Path:
        """Gives the draft its name."""
        target, replaced = self.directory / self.tag, self.directory / REPLACED / self.tag
        _sync(self.path)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            replaced.parent.mkdir(exist_ok=True)
            target.rename(replaced)
        self.path.rename(target)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `path` at once: readers see the old one or the new one."""
    draft = _hidden(path.parent)
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file at once."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def point_latest(directory: Path, tag: str) -> None:
    """Makes `latest` name a tag."""
    write_text(directory / LATEST, tag + "\n")


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, never the one that `latest` names."""
    for tag in tags(directory)[:-keep]:
        if tag != latest(directory):
            hidden = _hidden(directory)  # out of sight first, so that nobody sees half of it
            try:
                (directory / tag).rename(hidden)
            except FileNotFoundError:  # another writer was faster
                continue
            shutil.rmtree(hidden, ignore_errors=True)


def _hidden(directory: Path) -> Path:
    """A new name for something unfinished, which tells who is at it."""
    return directory / f".new.{os.getpid()}.{next(_counter)}.{socket.gethostname()}"


def _clean(directory: Path) -> None:
    """Removes what dead writers of this machine left."""
    for path in directory.glob(".new.*"):
        pid, _, host = path.name.split(".", 4)[2:]
        if host != socket.gethostname() or _is_running(int(pid)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
