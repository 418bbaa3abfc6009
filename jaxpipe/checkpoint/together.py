"""Writes one checkpoint from several processes: each its share of the items, all or nothing.

The first process makes a draft and a board (see `board`), and each process writes its items into the draft. When all are
done, the first one writes the manifest, gives the draft its name, and says so on the board. If anything goes wrong
anywhere, it says that, and nothing is left. Either way all processes come to the same end.

`begin` is a collective of the devices. What follows talks through the board alone, so that it may run in the background.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items
from jaxpipe.checkpoint.board import DONE, FAILED, LEFT, QUIET, SAVED, WRITING, Board, Notice, Notices
from jaxpipe.checkpoint.items import Arrays
from jaxpipe.checkpoint.manifest import Manifest
from jaxpipe.checkpoint.write import Order, Source, as_checkpoint_error, complete, files_in, publish
from jaxpipe.errors import CheckpointError
from jaxpipe.processes.group import Group

SIGHT = 30.0  # seconds after which a folder that the first process has made should be seen by all
HURRY = 5.0  # seconds that an interrupted process waits for the others


def begin(group: Group, order: Order, made: Manifest) -> "Share":
    """Makes the draft and the board. Every process calls it, from its main thread.

    Args:
      order: the same on all processes.
      made: the manifest, without `files`; that of the first process is written.

    Returns:
      The share of this process.

    Raises:
      CheckpointError: on all processes, if one of them cannot write into the directory, or does not see it.
    """

    def or_error(attempt: Callable[[], Any]) -> Any:
        try:
            return attempt()
        except Exception as error:
            raise as_checkpoint_error(error, order.target) from error

    with contextlib.ExitStack() as stack:
        draft = folders.Draft(order.directory, order.tag)

        def make() -> list[str]:
            if not group.first:
                return []
            board = stack.enter_context(folders.hidden_folder(_made(order.directory)))
            return [stack.enter_context(draft).name, board.name]

        names = group.broadcast(group.together(lambda: or_error(make)))
        path, folder = (order.directory / name for name in names)
        board = Board(folder, group.me)

        def join() -> None:
            _see(path, group.me)
            board.join()

        group.together(lambda: or_error(join))
        return Share(group, order, made, draft, path, board, stack.pop_all())


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _see(path: Path, me: int) -> None:
    begun = time.monotonic()
    while not path.is_dir():
        if time.monotonic() - begun > SIGHT:
            raise CheckpointError(
                f"{path.parent}: the first process has made a folder there, which process {me} does not "
                "see: expected a directory on a file system that all processes share."
            )
        time.sleep(0.1)


class Share:
    """The share of this process in a checkpoint that is being written."""

    def __init__(
        self,
        group: Group,
        order: Order,
        made: Manifest,
        draft: folders.Draft,
        path: Path,
        board: Board,
        removal: contextlib.ExitStack,
    ):
        self._group, self._order, self._made, self._draft, self._path = group, order, made, draft, path
        self._board, self._removal = board, removal
        self._first, self._me = group.members[0], board.me
        self._others = [member for member in group.members if member != self._me]
        self._written: list[str] = []
        self._error: Exception | None = None

    def copy(self, source: Source) -> Source:
        """Copies what a source yields to the host, on the main thread. A failure is told when the copies are written."""
        copied: list[tuple[str, Arrays]] = []

        def keep(name: str, arrays: Arrays) -> None:
            copied.append((name, {key: np.array(array) for key, array in arrays.items()}))

        with self._or_nothing():
            self._drain(source, keep)
        return copied

    def run(self, source: Source) -> Path:
        """Writes the items of this process, and waits until the checkpoint is complete.

        Returns:
          The folder of the checkpoint.

        Raises:
          CheckpointError: on all processes, if the checkpoint could not be written. Nothing of it is left.
        """
        with self._or_nothing():
            self._drain(source, self._write)
            if self._error is not None:
                raise self._error
            self._lead() if self._group.first else self._follow()
        self._removal.close()
        return self._order.target

    def _drain(self, source: Source, take: Callable[[str, Arrays], None]) -> None:
        """Gives all items to `take`. After a failure it only goes on to the end: the source contains collectives."""
        try:
            for name, arrays in source:
                if self._error is None:
                    try:
                        take(name, arrays)
                    except Exception as error:
                        self._error = error
                del arrays  # before the next one is made
        except Exception as error:  # of the source itself
            self._error = self._error or error

    def _write(self, name: str, arrays: Arrays) -> None:
        if not self._group.first:
            self._heed(self._board.read(self._first))
        items.write(self._path / name, arrays)
        self._written.append(name)
        self._board.post(Notice(WRITING, len(self._written)))

    # ---------------------------------------------------------------------------------------------- the first process

    def _lead(self) -> None:
        """Waits for the others, and completes the checkpoint."""
        files = files_in(self._path, self._written)
        done = self._board.wait(self._others, _all_done_or_one_failed, changed=self._relay)
        for process, notice in done.items():
            if notice is None or notice.state == FAILED:
                why = "it ended, or could not write any more." if notice is None else notice.text
                raise _Told(f"Process {process}: {why}")
        for process in self._others:
            files |= self._files_of(process)
        complete(self._draft, self._made, files)
        publish(self._order)
        self._board.post(Notice(SAVED))
        with contextlib.suppress(CheckpointError):  # it is saved, whoever has read that
            self._wait_until_read(QUIET)

    def _relay(self, notices: Notices) -> None:
        """Shows those who wait for this process that something happens."""
        written = sum(notice.items for notice in notices.values() if notice is not None)
        self._board.post(Notice(WRITING, len(self._written) + written))

    def _files_of(self, process: int) -> dict[str, int]:
        """The files that another process says it has written, after a look whether they are there."""
        said: dict[str, int] = json.loads(self._list_of(process).read_text())
        for name, size in said.items():
            try:
                found = (self._path / name).stat().st_size
            except FileNotFoundError:
                found = None
            if found != size:
                raise CheckpointError(
                    f"{self._order.target}: process {process} has written {size} bytes of {name}, and process "
                    f"{self._first} finds {'no such file' if found is None else f'{found} bytes'}: expected a directory "
                    "on a file system that all processes share."
                )
        return said

    def _wait_until_read(self, patience: float) -> None:
        """Waits until the others know the end; after that the board may be removed."""
        self._board.wait(self._others, lambda notices: all(n is None or n.last for n in notices.values()), patience)

    # ------------------------------------------------------------------------------------------------------ the others

    def _follow(self) -> None:
        """Says that the items of this process are there, and waits for the first one."""
        self._list_of(self._me).write_text(json.dumps(files_in(self._path, self._written)))
        self._board.post(Notice(DONE, len(self._written)))
        end = self._board.wait([self._first], lambda notices: all(n is None or n.last for n in notices.values()))
        self._heed(end[self._first])
        self._board.post(Notice(LEFT))

    def _heed(self, notice: Notice | None) -> None:
        """Raises CheckpointError if the first process says that there will be no checkpoint."""
        if notice is None:
            raise _Told(
                f"Process {self._first}: {self._order.target}: it ended while the checkpoint was being written."
            )
        if notice.state == FAILED:
            raise _Told(notice.text)

    # ---------------------------------------------------------------------------------------------------------- all

    def _list_of(self, process: int) -> Path:
        """A file with the names and sizes of the files that a process has written."""
        return self._board.folder / f"files_{process}"

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """If anything fails, tells the others, waits until nobody writes any more, and leaves nothing behind."""
        try:
            yield
        except BaseException as error:
            told = isinstance(error, _Told)
            known = CheckpointError(str(error)) if told else as_checkpoint_error(error, self._order.target)
            with self._removal, contextlib.suppress(CheckpointError):  # nobody is waited for for ever
                self._give_up(known, told, QUIET if isinstance(error, Exception) else HURRY)
            if known is error or not isinstance(error, Exception):
                raise
            raise known from (None if told else error)

    def _give_up(self, error: CheckpointError, told: bool, patience: float) -> None:
        if self._group.first:
            self._board.post(Notice(FAILED, text=str(error) if told else f"Process {self._me}: {error}"))
            self._wait_until_read(patience)
        else:
            self._board.post(Notice(LEFT) if told else Notice(FAILED, text=str(error)))
            self._board.wait([self._first], lambda notices: notices[self._first] is None, patience)


class _Told(Exception):
    """A failure that is told of another process; the message says of which one."""


def _all_done_or_one_failed(notices: Notices) -> bool:
    states = [FAILED if notice is None else notice.state for notice in notices.values()]
    return FAILED in states or all(state == DONE for state in states)
