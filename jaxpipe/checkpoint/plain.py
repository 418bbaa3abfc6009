"""Another path to a folder, for libraries that read more into a path than the names of folders. Files only, no JAX.

Orbax and what is below it look for files with patterns made of the whole path (`[`, `*`, `?`), take a few beginnings and
endings for something else (`/gs/`, `~`, `:/`, a backslash), and shorten `link/..` to nothing, which is another folder
where `link` is a symbolic link. None of that raises: files end up elsewhere, or are not found.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxpipe.errors import CheckpointError

# What surely has no second meaning. Paths near the limit of the system are not plain: the library appends to them.
_PLAIN = re.compile(r"/(?!gs/|s3/|az/|hf/)[A-Za-z0-9_./=+,@-]{0,1000}")


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """A path of the same folder that has no characters of a special meaning; `folder` itself if it is such a path.

    Args:
      folder: absolute, and there.

    Raises:
      CheckpointError: this machine has no place for such a path.
    """
    if _PLAIN.fullmatch(os.fspath(folder)) and ".." not in folder.parts:
        yield folder
        return
    with contextlib.ExitStack() as stack:
        yield _by_descriptor(folder, stack) or _by_link(folder, stack)


def _by_descriptor(folder: Path, stack: contextlib.ExitStack) -> Path | None:
    """The folder as an open file of this process; None on systems that do not offer that. Leaves nothing behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    path = Path(f"/proc/self/fd/{descriptor}")
    try:
        return path if path.samefile(folder) else None
    except OSError:
        return None


def _by_link(folder: Path, stack: contextlib.ExitStack) -> Path:
    """A symbolic link in the folder for temporary files."""
    link = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxpipe-"))) / "folder"
    if not _PLAIN.fullmatch(os.fspath(link)):
        raise CheckpointError(
            f"{folder}: this path has characters with a special meaning for Orbax, and so has that of temporary files, "
            f"{link.parent}: expected one of both without. Set the environment variable TMPDIR to a plain path."
        )
    link.symlink_to(folder, target_is_directory=True)
    return link
