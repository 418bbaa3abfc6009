"""A directory of checkpoints: its tags, its file `latest`, and how a checkpoint is written whole or not at all.

    <directory>/latest            a text file with a tag
    <directory>/<tag>/            a checkpoint; it is complete as soon as it has this name
    <directory>/.new.<writer>     a checkpoint that is being written, or the board of several processes that write one
    <directory>/.replaced/<tag>   the former checkpoint of that tag, while the new one takes its place

A writer that dies leaves hidden folders. A later writer removes them when they have not been touched for a while. If a
writer dies between the two renames that replace a tag, readers find the former checkpoint, and the next writer puts it
back. This module works on files only and does not use JAX.
"""

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxpipe.checkpoint import manifest
from jaxpipe.checks import did_you_mean
from jaxpipe.errors import CheckpointError

LATEST = "latest"
REPLACED = ".replaced"
UNTOUCHED = 600.0  # seconds after which a draft without a living writer is removed
_drafts: set[Path] = set()  # the drafts of this process


def as_directory(directory: str | os.PathLike[str]) -> Path:
    """Makes a path absolute.

    A leading `~` stands for the home folder, and `~name` for the home folder of that user, if there is such a user. No
    other character has a special meaning.

    Raises:
      CheckpointError: it is not the path of a folder, or not one on a mounted file system (a URL, for example).
    """
    text = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(f"directory={directory!r}: expected the path of a folder, as a str or pathlib.Path.")
    if "://" in text:
        raise CheckpointError(
            f"directory={text!r}: expected a path of a mounted file system. Mount the bucket, or copy the checkpoint."
        )
    try:
        # Unlike Path.expanduser it leaves `~x` as it is where there is no user x.
        return Path(os.path.expanduser(text)).absolute()
    except OSError as error:
        raise CheckpointError(f"directory={text!r}: {error}. Pass an absolute path.") from error


def check_tag(tag: str) -> str:
    """Returns the tag.

    Raises:
      CheckpointError: it cannot be the name of a folder in a directory of checkpoints.
    """
    allowed = isinstance(tag, str) and tag.isprintable() and 0 < len(tag.encode()) <= 200 and tag == tag.strip()
    if not allowed or tag.startswith(".") or tag == LATEST or {"/", os.sep} & set(tag):
        raise CheckpointError(
            f"tag={tag!r}: expected the name of a folder, such as 'global_step100': no '/', no dot in front, no space at "
            f"the ends, and not {LATEST!r}."
        )
    return tag


def tags(directory: Path) -> list[str]:
    """The tags of all complete checkpoints, the oldest first."""
    found: dict[str, tuple[str, int]] = {}
    for path in [*directory.glob(f"{REPLACED}/*/{manifest.NAME}"), *directory.glob(f"*/{manifest.NAME}")]:
        if path.parent.name.startswith("."):
            continue
        try:
            made = manifest.read(path.parent)
        except CheckpointError:  # it belongs to another program, is damaged, or was removed in the meantime
            continue
        found[path.parent.name] = made.saved_at, made.step
    return sorted(found, key=lambda tag: (found[tag], tag))


def latest(directory: Path) -> str | None:
    """The tag that `latest` names, or None if there is no such file.

    Raises:
      CheckpointError: the file holds no tag.
    """
    path = directory / LATEST
    try:
        return check_tag(path.read_text(encoding="utf-8").strip())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: expected a tag in this file, found: {error}") from error


def find(directory: Path, tag: str) -> Path:
    """The folder of the checkpoint with a tag.

    Raises:
      CheckpointError: there is none. The message lists the tags that exist.
    """
    # The second folder counts too, because a writer may have died while it replaced the tag.
    for path in (directory / tag, directory / REPLACED / tag):
        try:
            if path.exists():
                return path
        except OSError as error:  # the name is too long, or the folder may not be read
            raise CheckpointError(f"{path}: expected a checkpoint, found: {error}.") from error
    known = tags(directory)
    there = f"found {', '.join(known)}" if known else "found no checkpoint at all"
    raise CheckpointError(f"{directory}: expected the tag {tag!r}, {there}.{did_you_mean(tag, known)}")


class Draft:
    """A checkpoint that is being written: `with Draft(...) as path:`, and then `commit`.

    Without a `commit` nothing of it is left after the `with` block.
    """

    def __init__(self, directory: Path, tag: str):
        self.directory, self.tag = directory, tag
        self.path = _hidden(directory)

    def __enter__(self) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        _put_back(self.directory)
        if (target := self.directory / self.tag).exists():
            _check_is_checkpoint(target)
        _clean(self.directory)
        _drafts.add(self.path)
        self.path.mkdir()
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        _drafts.discard(self.path)

    def commit(self) -> Path:
        """Renames the draft to its tag, and returns its new path."""
        target, replaced = self.directory / self.tag, self.directory / REPLACED / self.tag
        _sync(self.path)
        if target.exists():
            replaced.parent.mkdir(exist_ok=True)
            target.rename(replaced)
        self.path.rename(target)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        return target


@contextlib.contextmanager
def hidden_folder(directory: Path) -> Iterator[Path]:
    """Makes a hidden folder in a directory, which is removed after the `with` block."""
    path = _hidden(directory)
    _drafts.add(path)
    try:
        path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _drafts.discard(path)


def _check_is_checkpoint(target: Path) -> None:
    """Raises CheckpointError if saving would replace something that is no checkpoint."""
    try:
        manifest.read(target)
    except CheckpointError as error:
        raise CheckpointError(
            f"{target} is in the way: it would be replaced, but it is no checkpoint that this version can read. Use "
            f"another tag, or remove it. ({error})"
        ) from None


def _put_back(directory: Path) -> None:
    """Cleans up after a writer that died while it replaced a tag."""
    for replaced in (directory / REPLACED).glob("*"):
        if (directory / replaced.name).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(directory / replaced.name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write to, which then takes the place of `path` in one step: readers see the old or the new file."""
    draft = _hidden(path.parent)
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step: readers see the old or the new text."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def point_latest(directory: Path, tag: str) -> None:
    """Makes `latest` name a tag."""
    write_text(directory / LATEST, tag + "\n")


def prune(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints. The one that `latest` names always stays."""
    for tag in tags(directory)[:-keep]:
        if tag != latest(directory):
            hidden = _hidden(directory)  # renamed first, so that nobody sees half of a checkpoint
            try:
                (directory / tag).rename(hidden)
            except FileNotFoundError:  # another writer was faster
                continue
            shutil.rmtree(hidden, ignore_errors=True)


def _hidden(directory: Path) -> Path:
    """A new hidden name for something unfinished. It has the process and the machine of the writer in it."""
    return directory / f".new.{os.getpid()}.{uuid.uuid4().hex}.{socket.gethostname()}"


def _clean(directory: Path) -> None:
    """Removes the drafts of writers on this machine that have died.

    The number of a process says too little: another process may have it by now, and another container may have the same
    host name. So a draft is removed only if it has not been touched for a while either.
    """
    for path in directory.glob(".new.*"):
        parts = re.fullmatch(r"\.new\.(\d+)\.\w+\.(.*)", path.name)
        if not parts or parts[2] != socket.gethostname() or path in _drafts:
            continue
        if int(parts[1]) != os.getpid() and _is_running(int(parts[1])):
            continue
        try:
            touched = max(each.stat().st_mtime for each in [path, *path.rglob("*")])
        except FileNotFoundError:
            continue
        if time.time() - touched < UNTOUCHED:
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
    """Makes the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
