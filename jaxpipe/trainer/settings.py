"""What a `Trainer` was asked for, checked before anything runs."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from jaxpipe.checkpoint.directory import as_directory
from jaxpipe.checks import count, show
from jaxpipe.engine import Engine
from jaxpipe.errors import ConfigError, DataError
from jaxpipe.trainer.callback import Callback
from jaxpipe.types import Batch

# An iterable of micro-batches; or a function of the number of micro-batches that were taken already, for training, and of
# nothing, for evaluation.
TrainData: TypeAlias = Iterable[Batch] | Callable[[int], Iterable[Batch]]
EvalData: TypeAlias = Iterable[Batch] | Callable[[], Iterable[Batch]]


def check_engine(engine: object) -> None:
    """Raises ConfigError if it is no engine."""
    if not isinstance(engine, Engine):
        raise ConfigError(f"Trainer: engine={show(engine)}: expected what jaxpipe.initialize returns.")


def check_data(train_data: object, eval_data: object, eval_batches: int | None) -> None:
    """Raises DataError for data that yield nothing, or that the first evaluation would use up."""
    for name, data, arguments in (("train_data", train_data, (0,)), ("eval_data", eval_data, ())):
        if data is None and name == "eval_data":
            continue
        if is_function(data):
            _check_takes(name, data, arguments)
        elif not isinstance(data, Iterable):
            raise DataError(
                f"Trainer: {name} is a {type(data).__name__}, which yields nothing. Pass an iterator, a loader, or a "
                "function that makes one."
            )
    if isinstance(eval_data, Iterator) and eval_batches is None:
        raise DataError(
            f"Trainer: eval_data is an iterator ({type(eval_data).__name__}), and the first evaluation would use it up. "
            "Pass a list, a loader, or a function that makes a new iterator; or eval_batches=, for one without end."
        )


def is_function(data: object) -> bool:
    """Whether data are a function that makes them."""
    return callable(data) and not hasattr(data, "__iter__")


def _check_takes(name: str, function: Any, arguments: tuple[int, ...]) -> None:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        rule = "the number of micro-batches that were used" if arguments else "nothing"
        raise DataError(f"Trainer: {name}={show(function)}: it is called with {rule}, but {error}.") from None
    except ValueError:  # a function of C that does not say what it takes
        return


def cadence(name: str, value: int | None, needs: str, given: object) -> int | None:
    """The number of steps from one evaluation or checkpoint to the next, or None.

    Args:
      needs: the name of another setting, without which this one means nothing.
      given: its value.

    Raises:
      ConfigError: it is no integer of at least 1, or the other setting is missing.
    """
    if value is None:
        return None
    number = count(f"Trainer: {name}", value, f" Leave it out to have it at the end only, with {needs}=.")
    if given is None:
        raise ConfigError(f"Trainer: {name}={number} without {needs}. Pass {needs}=, or leave {name} out.")
    return number


def folder(directory: str | os.PathLike[str] | None) -> Path | None:
    """The folder of checkpoints; CheckpointError if there cannot be one."""
    return None if directory is None else as_directory(directory)


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks as a tuple; raises ConfigError for what is none."""
    given: Sequence[object] = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for number, callback in enumerate(given):
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise ConfigError(
                f"Trainer: callbacks[{number}] is the class {callback.__name__}. Call it: write "
                f"{callback.__name__}(...)."
            )
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"Trainer: callbacks[{number}]={show(callback)}: expected a jaxpipe.callbacks.Callback. Derive a "
                "class from it, and override what it shall do."
            )
    return tuple(callback for callback in given if isinstance(callback, Callback))
