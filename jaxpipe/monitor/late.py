"""Results of work that was dispatched and may still be running. They are read late, so that the host never waits."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Result = TypeVar("Result")


def is_ready(value: object) -> bool:
    """Whether a value has been computed. A value that is no array on a device always has."""
    asked: Callable[[], bool] = getattr(value, "is_ready", lambda: True)
    return asked()


class Late(Generic[Result]):
    """A queue of results, oldest first.

    Args:
      ready: says whether a result has been computed. Devices finish work in order, so a search ends at the first result
        that is not ready.
    """

    def __init__(self, ready: Callable[[Result], bool] = is_ready):
        self._pending: deque[Result] = deque()
        self._ready = ready

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, result: Result) -> None:
        """Adds a result that is still on its way."""
        self._pending.append(result)

    def clear(self) -> None:
        """Forgets all results."""
        self._pending.clear()

    def finished(self) -> Iterator[Result]:
        """Takes the results that have been computed. It never waits."""
        while self._pending and self._ready(self._pending[0]):
            yield self._pending.popleft()

    def beyond(self, most: int) -> Iterator[Result]:
        """Takes the oldest results while there are more than `most`, computed or not. Reading one may wait for it."""
        while len(self._pending) > most:
            yield self._pending.popleft()
