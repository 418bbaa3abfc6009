"""`ScalarWriter`: the base of callbacks that write the metrics of a run somewhere."""

from typing import Any

import numpy as np

from jaxpipe.checks import count
from jaxpipe.trainer.callback import Callback, Metrics, Result, Running


class ScalarWriter(Callback):
    """Writes metrics by name: "train/loss" of steps, "eval/loss" of evaluations. Override `open`, `write` and `close`.

    They are called in the first process only. Metrics that are arrays are left out.

    Args:
      every: write so many steps apart, 1 or more. Evaluations are always written.
    """

    def __init__(self, *, every: int = 1):
        self.every = count(f"{type(self).__name__}: every", every)

    def open(self, run: Running) -> None:
        """Opens what is written to. If `run.began` is above 0, what was written behind that step is made void."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes values by name."""
        raise NotImplementedError

    def flush(self) -> None:
        """Brings what was written to where others can read it. Called after evaluations and in front of checkpoints."""

    def close(self) -> None:
        """Closes it."""

    def on_start(self, run: Running) -> None:
        if run.writes:
            self.open(run)

    def on_step(self, run: Running, step: int, metrics: Metrics) -> None:
        if run.writes and step % self.every == 0:
            self.write(step, _named("train", metrics))

    def on_evaluate(self, run: Running, step: int, found: Metrics) -> None:
        if run.writes:
            self.write(step, _named("eval", found))
            self.flush()

    def on_checkpoint(self, run: Running, step: int, path: str) -> None:
        if run.writes:
            self.flush()

    def on_end(self, run: Running, result: Result) -> None:
        if run.writes:
            self.close()


def _named(prefix: str, found: Metrics) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in found.items() if np.ndim(value) == 0}
