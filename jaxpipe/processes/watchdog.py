"""What this process does: noted by its main thread, looked at by another one, and told to the other processes.

The functions at the end are what the rest of the library calls. Where there is one process, nothing is noted.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

import jax

Item = TypeVar("Item")
OUTSIDE, ITERATOR = "outside of train_batch", "in its data iterator"
# Seconds. A longer time between two looks means that this process did not run, and does not count.
LONGEST_LOOK = 2.0


class Waits(NamedTuple):
    """The oldest work of all processes of a mesh that has begun here and has not finished.

    Attributes:
      members: the processes that take part in it.
      number: how many such works this process has begun, up to this one.
      what: its name in messages.
      seconds: for how long it has been the oldest.
      timed: whether it must finish within the time limit.
    """

    members: tuple[int, ...]
    number: int
    what: str
    seconds: float
    timed: bool


@dataclass(frozen=True)
class Status:
    """What a process says about itself, about once a second.

    Attributes:
      place: where its main thread is.
      seconds: for how long.
      begun: how many works it has begun with each set of processes; see `key`.
      waits: what it waits for; None if nothing is on its way.
    """

    place: str = OUTSIDE
    seconds: float = 0.0
    begun: Mapping[str, int] | None = None
    waits: Waits | None = None

    def count(self, members: Sequence[int]) -> int:
        """How many works with these processes it has begun."""
        return (self.begun or {}).get(key(members), 0)

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        return {"place": self.place, "seconds": self.seconds, "begun": self.begun, "waits": self.waits}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """As it was sent."""
        waits = said["waits"]
        return cls(**{**said, "waits": None if waits is None else Waits(tuple(waits[0]), *waits[1:])})


class _Work:
    """Something that takes all processes of a mesh. It has finished when `done` says so."""

    def __init__(self, waits: Waits, kind: str, done: Callable[[], bool]):
        self.waits, self.kind, self.done = waits, kind, done


class Activity:
    """What this process does. The main thread writes, and one other thread calls `look`.

    Args:
      clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._place = (OUTSIDE, clock())
        self._begun: dict[str, int] = {}
        self._works: deque[_Work] = deque()
        self._finished: set[tuple[str, str]] = set()
        self._oldest: _Work | None = None
        self._seconds, self._looked = 0.0, clock()

    @contextmanager
    def doing(self, place: str) -> Generator[None]:
        """Notes where the main thread is."""
        before = self._place[0]
        self._place = (place, self._clock())
        try:
            yield
        finally:
            self._place = (before, self._clock())

    def began(self, members: Sequence[int], kind: str, what: str, done: Callable[[], bool], timed: bool = True) -> None:
        """Notes a work that takes all of some processes, and has begun here.

        Args:
          kind: the first one of a kind has no time limit, because programs are compiled for it.
          what: its name in messages.
          done: called by the other thread; whether it has finished. It does not wait.
        """
        if len(members) > 1:
            with self._lock:
                number = self._begun[key(members)] = self._begun.get(key(members), 0) + 1
                self._works.append(_Work(Waits(tuple(members), number, what, 0.0, timed), kind, done))

    def look(self) -> Status:
        """What this process does now."""
        with self._lock:
            return self._look(self._clock())

    def _look(self, now: float) -> Status:
        passed, self._looked = min(now - self._looked, LONGEST_LOOK), now
        while self._works and self._works[0].done():
            work = self._works.popleft()
            self._finished.add((key(work.waits.members), work.kind))
        work = self._works[0] if self._works else None
        self._seconds = self._seconds + passed if work is self._oldest else 0.0
        self._oldest, waits = work, None
        if work is not None:
            timed = work.waits.timed and (key(work.waits.members), work.kind) in self._finished
            waits = work.waits._replace(seconds=self._seconds, timed=timed)
        place, since = self._place
        return Status(place, now - since, dict(self._begun), waits)

    def forget(self) -> None:
        """Forgets what has not finished; from then on no array is looked at."""
        with self._lock:
            self._works.clear()


def key(members: Sequence[int]) -> str:
    """The name of a set of processes."""
    return ",".join(map(str, members))


# ---------------------------------------------------------------------------------- called by the rest of the library

_activity: Activity | None = None


def note(activity: Activity | None) -> None:
    """From now on the main thread notes what it does; None: no longer."""
    global _activity
    _activity = activity


@contextmanager
def doing(place: str) -> Generator[None]:
    """Notes where the main thread is, such as "in train_batch"; also as a decorator."""
    if _activity is None:
        yield
    else:
        with _activity.doing(place):
            yield


def pulled(source: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator of the user, which may be stuck."""
    return source if _activity is None else _pulled(source)


def _pulled(source: Iterator[Item]) -> Iterator[Item]:
    while True:
        with doing(ITERATOR):
            try:
                item = next(source)
            except StopIteration:
                return
        yield item


@contextmanager
def waiting(members: Sequence[int], kind: str, what: str, timed: bool = True) -> Generator[Callable[[jax.Array], None]]:
    """Notes that the main thread may wait for the others inside the `with`; not `timed`: however long it takes.

    It yields a function that takes an array. If it is called, the work is not over at the end of the `with`, but when that
    array is there.
    """
    over: list[Callable[[], bool]] = []  # has one item when the `with` is over
    results: list[jax.Array] = []
    if _activity is not None:
        _activity.began(members, kind, what, lambda: bool(over) and over[0](), timed)
    try:
        yield results.append
    finally:
        over.append(_is_ready(results[0]) if results else lambda: True)


def began(members: Sequence[int], kind: str, what: str, result: jax.Array) -> None:
    """Notes a program of several processes that was dispatched, and has finished when `result` is there."""
    if _activity is not None:
        _activity.began(members, kind, what, _is_ready(result))


def _is_ready(result: jax.Array) -> Callable[[], bool]:
    ready: Callable[[], bool] = getattr(result, "is_ready", lambda: True)
    return lambda: result.is_deleted() or ready()
