"""A directory of checkpoints: tags, `latest`, and how writing one is all or nothing. Files only, no JAX.

    <directory>/latest            text: a tag
    <directory>/<tag>/            complete as soon as it has this name
    <directory>/.new.<writer>     being written
    <directory>/.replaced/<tag>   the former checkpoint of that tag, while the new one takes its place

A writer that dies leaves hidden folders, which a later writer removes when nobody has touched them for a while. If it
dies between the two renames that replace a tag, readers find the former one, and the next writer puts it back.
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
_drafts: set[Path] = set()  # those of this process


def as_directory(directory: str | os.PathLike[str]) -> Path:
    """The path, absolute; raises CheckpointError for what is none of a mounted file system.

    `~` is the home folder, and `~name` that of a user where there is one. No other character has a meaning.
    """
    text = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(f"directory={directory!r}: expected the path of a folder, as a str or pathlib.Path.")
    if "://" in text:
        raise CheckpointError(
            f"directory={text!r}: expected a path of a mounted file system. Mount the bucket, or copy the checkpoint."
        )
    try:
        # Unlike Path.expanduser it takes `~x` as it is where there is no user x.
        return Path(os.path.expanduser(text)).absolute()
    except OSError as error:
        raise CheckpointError(f"directory={text!r}: {error}. Pass an absolute path.") from error


def check_tag(tag: str) -> str:
    """Raises CheckpointError unless a tag can be the name of a folder here."""
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
        except CheckpointError:  # of another program, damaged, or removed meanwhile
            continue
        found[path.parent.name] = made.saved_at, made.step
    return sorted(found, key=lambda tag: (found[tag], tag))


def latest(directory: Path) -> str | None:
    """The tag that `latest` names, or None if there is no such file."""
    path = directory / LATEST
    try:
        return check_tag(path.read_text(encoding="utf-8").strip())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: expected a tag in this file, found: {error}") from error


def find(directory: Path, tag: str) -> Path:
    """The folder of a tag.

    Raises:
      CheckpointError: there is none; the tags that there are are named.
    """
    # The second one: its writer may have died while it replaced the tag.
    for path in (directory / tag, directory / REPLACED / tag):
        try:
            if path.exists():
                return path
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            raise CheckpointError(f"{path}: expected a checkpoint, found: {error}.") from error
    known = tags(directory)
    there = f"found {', '.join(known)}" if known else "found no checkpoint at all"
    raise CheckpointError(f"{directory}: expected the tag {tag!r}, {there}.{did_you_mean(tag, known)}")


class Draft:
    """A checkpoint being written; `with Draft(...) as path:` and then `commit`. Without a commit nothing is left."""

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
        """Gives the draft its name."""
        target, replaced = self.directory / self.tag, self.directory / REPLACED / self.tag
        _sync(self.path)
        if target.exists():
            replaced.parent.mkdir(exist_ok=True)
            target.rename(replaced)
        self.path.rename(target)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        return target


def _check_is_checkpoint(target: Path) -> None:
    """Raises CheckpointError if saving would replace something else."""
    try:
        manifest.read(target)
    except CheckpointError as error:
        raise CheckpointError(
            f"{target} is in the way: it would be replaced, but it is no checkpoint that this version can read. Use "
            f"another tag, or remove it. ({error})"
        ) from None


def _put_back(directory: Path) -> None:
    """Finishes what a writer left that died while it replaced a tag."""
    for replaced in (directory / REPLACED).glob("*"):
        if (directory / replaced.name).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(directory / replaced.name)


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
    return directory / f".new.{os.getpid()}.{uuid.uuid4().hex}.{socket.gethostname()}"


def _clean(directory: Path) -> None:
    """Removes what dead writers of this machine left.

    A process of that number may be another one by now, or live in another container of that name: so a draft must not
    have been touched for a while, either.
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
    """Makes a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
