"""Gives another path to a folder, for libraries that take some paths for more than the names of folders.

Orbax and the libraries below it search for files with patterns that they make of the whole path (`[`, `*`, `?`). They give
a special meaning to some beginnings and endings (`/gs/`, `~`, `:/`, a backslash). They shorten `link/..` to nothing, which
is another folder if `link` is a symbolic link. None of that raises an error: files end up elsewhere, or are not found.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxpipe.errors import CheckpointError

# Paths that surely have no second meaning. Paths near the limit of the system are not plain: the library makes them longer.
_PLAIN = re.compile(r"/(?!gs/|s3/|az/|hf/)[A-Za-z0-9_./=+,@-]{0,1000}")


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """Gives a path to the same folder without characters that have a special meaning; `folder` itself if it is plain.

    Args:
      folder: an absolute path of an existing folder.

    Raises:
      CheckpointError: this machine has no place for such a path.
    """
    if _PLAIN.fullmatch(os.fspath(folder)) and ".." not in folder.parts:
        yield folder
        return
    with contextlib.ExitStack() as stack:
        yield _by_descriptor(folder, stack) or _by_link(folder, stack)


def _by_descriptor(folder: Path, stack: contextlib.ExitStack) -> Path | None:
    """The path of the folder as an open file of this process, which leaves nothing behind; None if the system has none."""
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    path = Path(f"/proc/self/fd/{descriptor}")
    try:
        return path if path.samefile(folder) else None
    except OSError:
        return None


def _by_link(folder: Path, stack: contextlib.ExitStack) -> Path:
    """The path of a symbolic link to the folder, in the folder for temporary files."""
    link = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxpipe-"))) / "folder"
    if not _PLAIN.fullmatch(os.fspath(link)):
        raise CheckpointError(
            f"{folder}: this path has characters with a special meaning for Orbax, and so has that of temporary files, "
            f"{link.parent}: expected one of both without. Set the environment variable TMPDIR to a plain path."
        )
    link.symlink_to(folder, target_is_directory=True)
    return link
