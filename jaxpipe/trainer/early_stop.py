"""`EarlyStop`: ends a run whose evaluations get no better."""

import math
from typing import Any

from jaxpipe.checks import as_number, count, did_you_mean, show
from jaxpipe.errors import ConfigError
from jaxpipe.trainer.callback import Callback, Metrics, Running


class EarlyStop(Callback):
    """Ends the run after `patience` evaluations in a row that were no better than the best one before them.

    Checkpoints remember where it stands, so a run that is interrupted ends where it would have ended.

    Args:
      patience: number of evaluations, 1 or more.
      metric: the name of what is compared, a scalar that evaluations find.
      mode: "min" if less is better, or "max".
      least_change: what is better by no more than this is no better. In the unit of the metric, 0 or more.

    Attributes:
      best: the best value, or None in front of the first evaluation. A value that is not finite is never best.
      best_step: the step of that evaluation.
      waited: evaluations since then.
    """

    def __init__(self, patience: int, metric: str = "loss", *, mode: str = "min", least_change: float = 0.0):
        self.patience, self.metric = count("EarlyStop: patience", patience), metric
        if mode not in ("min", "max"):
            raise ConfigError(f'EarlyStop: mode={show(mode)} must be "min" or "max": whether less or more is better.')
        change = as_number(least_change)
        if change is None or change < 0:
            raise ConfigError(f"EarlyStop: least_change={show(least_change)} must be a finite number, 0 or more.")
        self._sign, self._change = (-1 if mode == "min" else 1), change
        self.best: float | None = None
        self.best_step, self.waited = 0, 0

    def on_start(self, run: Running) -> None:
        self._ask(run)  # a run that it has ended stays ended when it is started again

    def on_evaluate(self, run: Running, step: int, found: Metrics) -> None:
        if self.metric not in found:
            raise ConfigError(
                f"EarlyStop: metric={show(self.metric)} is not among what the evaluation found: "
                f"{', '.join(found)}.{did_you_mean(self.metric, found)}"
            )
        value = float(found[self.metric])
        better = self.best is None or self._sign * (value - self.best) > self._change
        if better and math.isfinite(value):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        self._ask(run)

    def _ask(self, run: Running) -> None:
        if self.waited >= self.patience:
            best = "was never finite" if self.best is None else f"is still the {self.best:.6g} of step {self.best_step}"
            run.stop(f"EarlyStop: after {self.waited} more evaluations the best {self.metric} {best}")

    def get_state(self) -> Any:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def set_state(self, state: Any) -> None:
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
