"""What a checkpoint remembers of a run beside the state of the engine: its last evaluation, and its callbacks."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxpipe.trainer.callback import Callback, Metrics

KEY = "trainer"


def remember(evaluation: tuple[int, Metrics] | None, callbacks: Sequence[Callback]) -> dict[str, Any]:
    """The client state of a checkpoint.

    Args:
      evaluation: step and values of the last one.
    """
    states = {name: state for name, callback in _named(callbacks) if (state := callback.get_state()) is not None}
    return {
        KEY: {
            "evaluation": None if evaluation is None else [evaluation[0], as_json(evaluation[1])],
            "callbacks": states,
        }
    }


def recall(client_state: dict[str, Any], callbacks: Sequence[Callback]) -> tuple[int, Metrics] | None:
    """Gives callbacks their states back, and returns the last evaluation.

    A callback that the checkpoint does not know, and a state whose callback is gone, are left alone; and so is a checkpoint
    that was not written by a trainer.
    """
    held = client_state.get(KEY)
    if held is None:
        return None
    for name, callback in _named(callbacks):
        if name in held["callbacks"]:
            callback.set_state(held["callbacks"][name])
    return None if held["evaluation"] is None else (held["evaluation"][0], held["evaluation"][1])


def as_json(found: Metrics) -> dict[str, Any]:
    """Metrics as JSON can hold them: arrays are lists."""
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def _named(callbacks: Sequence[Callback]) -> Iterator[tuple[str, Callback]]:
    """Names that stay when callbacks of another class come or go: the class, and a number from the second one on."""
    seen: dict[str, int] = {}
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name} {seen[name]}"), callback
