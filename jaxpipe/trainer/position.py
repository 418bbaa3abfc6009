"""`Position`: the data of a run, and where in them it stands."""

from collections.abc import Iterator
from typing import Any

from jaxpipe.errors import DataError
from jaxpipe.trainer.settings import TrainData, is_function
from jaxpipe.types import Batch


class Position:
    """The iterator over the data of training, brought to where a run goes on.

    Three ways, the first that applies: a function is called with the number of micro-batches that were taken already; an
    iterator with `get_state` and `set_state`, such as grain's, is set by the checkpoint, which has its state; from all else
    as many micro-batches are taken and dropped.

    Args:
      given: what the user has passed.
    """

    def __init__(self, given: TrainData):
        self._given = given
        self._made: Iterator[Batch] | None = None if is_function(given) else iter(given)  # type: ignore[arg-type]

    @property
    def remembered(self) -> Any:
        """The iterator whose state a checkpoint stores, or None."""
        own = self._made
        return own if hasattr(own, "get_state") and hasattr(own, "set_state") else None

    def start(self, seen: int, loaded: bool) -> Iterator[Batch]:
        """The iterator at the place where the run goes on.

        Args:
          seen: micro-batches that the engine has taken.
          loaded: whether a checkpoint was loaded, so that an iterator that it could not set stands at its begin.
        """
        if self._made is None:
            made: Any = self._given(seen)  # type: ignore[operator]
            try:
                self._made = iter(made)
            except TypeError:
                raise DataError(
                    f"Trainer: train_data({seen}) returned a {type(made).__name__}, which yields nothing: expected an "
                    "iterator that goes on behind so many micro-batches."
                ) from None
        elif loaded and self.remembered is None:
            for _ in range(seen):
                if next(self._made, None) is None:
                    break
        return self._made
