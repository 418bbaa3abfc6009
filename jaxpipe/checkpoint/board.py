"""A board: what several processes tell each other, through files, about a checkpoint that they write together.

Devices cannot carry these messages. A checkpoint may be written in the background, and a collective of the devices there
would meet those of a training step in another order than on another process.

On the board every process has one file, which it alone writes, in place, and whose size never changes. That still works
when the disk is full. It also works on network file systems: they look at a file anew when it is opened, but may not notice
for a minute that a folder has other names in it. This module works on files only and does not use JAX.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxpipe.errors import CheckpointError

# What a process does. The last three are its last words.
WRITING, DONE, FAILED, SAVED, LEFT = "writing", "done", "failed", "saved", "left"

SIZE = 2048  # bytes of a file on the board
QUIET = 3600.0  # seconds after which a process that says nothing new is waited for no longer
REMIND = 60.0  # seconds after which it is logged for whom one waits
FASTEST, SLOWEST = 0.02, 1.0  # seconds between two looks at the board
log = logging.getLogger(__name__)


class Notice(NamedTuple):
    """What a process says.

    Attributes:
      state: one of the words above.
      items: how many items it has written.
      text: why it failed.
    """

    state: str
    items: int = 0
    text: str = ""

    @property
    def last(self) -> bool:
        """Whether the process says nothing more."""
        return self.state in (FAILED, SAVED, LEFT)


Notices = Mapping[int, Notice | None]  # by process; None: it has no notice, because it is gone or the board is


class Board:
    """The notices of all processes about one checkpoint.

    Args:
      folder: where they are; an existing folder.
      me: the number of this process.
    """

    def __init__(self, folder: Path, me: int):
        self.folder, self.me = folder, me
        self._known: dict[int, Notice] = {}

    def join(self) -> None:
        """Makes the notice of this process. Its room on the disk is taken for good.

        Raises:
          OSError: it could not be made.
        """
        with self._path(self.me).open("xb") as file:
            file.write(_as_bytes(Notice(WRITING)))
            file.flush()
            os.fsync(file.fileno())

    def post(self, notice: Notice) -> None:
        """Replaces the notice of this process. If that fails, it is taken away, which tells the others, too."""
        try:
            with self._path(self.me).open("r+b", buffering=0) as file:
                file.write(_as_bytes(notice))
        except OSError as error:
            log.warning("%s: %s", self._path(self.me), error)
            with contextlib.suppress(OSError):
                self._path(self.me).unlink(missing_ok=True)

    def read(self, process: int) -> Notice | None:
        """What a process says; None if it has no notice."""
        try:
            found = self._path(process).read_bytes()
        except OSError:
            return None
        with contextlib.suppress(ValueError, TypeError):  # it is just being written; what it said before is true, too
            self._known[process] = Notice(*json.loads(found))
        return self._known.get(process, Notice(WRITING))

    def wait(
        self,
        processes: Sequence[int],
        enough: Callable[[Notices], bool],
        patience: float = QUIET,
        changed: Callable[[Notices], None] = lambda notices: None,
    ) -> Notices:
        """Waits until the notices of some processes are `enough`, and returns them.

        Args:
          patience: seconds without anything new after which it gives up.
          changed: is called when there is something new.

        Raises:
          CheckpointError: nothing new came for too long. The message says who did not finish.
        """
        seen: Notices | None = None
        begun = news = reminded = time.monotonic()
        pause = FASTEST
        while True:
            notices = {process: self.read(process) for process in processes}
            if enough(notices):
                return notices
            now = time.monotonic()
            if notices != seen:
                seen, news, pause = notices, now, FASTEST
                changed(notices)
            open_ones = _listed(notices)
            if now - news > patience:
                raise CheckpointError(
                    f"{self.folder.parent}: expected to hear of {open_ones}, and nothing happened for {patience:.0f} "
                    "seconds. Look at what that process prints, and whether it sees this folder."
                )
            if now - reminded > REMIND:
                reminded = now
                log.warning("%s: waiting for %s, since %.0f seconds", self.folder.parent, open_ones, now - begun)
            time.sleep(pause)
            pause = min(1.3 * pause, SLOWEST)

    def _path(self, process: int) -> Path:
        return self.folder / f"process_{process}"


def _listed(notices: Notices) -> str:
    """The processes that have not said their last word, and how far they are, for messages."""
    open_ones = [
        f"process {process} ({notice.state}, {notice.items} items written)"
        for process, notice in notices.items()
        if notice is not None and not notice.last
    ]
    return ", ".join(open_ones[:8]) + (f" and {len(open_ones) - 8} more" if len(open_ones) > 8 else "")


def _as_bytes(notice: Notice) -> bytes:
    """The file of a notice: as JSON, cut or padded to `SIZE` bytes."""
    text = notice.text
    while len(made := json.dumps([notice.state, notice.items, text]).encode()) > SIZE:
        text = text[: len(text) // 2]
    return made.ljust(SIZE)
