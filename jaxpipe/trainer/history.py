"""`History`: the curves of a run, in memory."""

from typing import Any

from jaxpipe.trainer.callback import Callback, Metrics, Running
from jaxpipe.trainer.memory import as_json


class History(Callback):
    """Keeps the metrics of steps and evaluations, for a picture at the end. Checkpoints remember them.

    Attributes:
      steps: pairs of a step and its metrics.
      evaluations: the same for evaluations.

    What `curve` gives can be plotted: `plt.plot(*history.curve("loss"))`.
    """

    def __init__(self):
        self.steps: list[tuple[int, Metrics]] = []
        self.evaluations: list[tuple[int, Metrics]] = []

    def on_step(self, run: Running, step: int, metrics: Metrics) -> None:
        self.steps.append((step, metrics))

    def on_evaluate(self, run: Running, step: int, found: Metrics) -> None:
        self.evaluations.append((step, found))

    def curve(self, name: str, *, evaluations: bool = False) -> tuple[list[int], list[Any]]:
        """The steps at which a metric was found, and its values.

        Args:
          name: of the metric.
          evaluations: take that of the evaluations, not that of the steps.
        """
        pairs = [
            (step, found[name]) for step, found in (self.evaluations if evaluations else self.steps) if name in found
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def get_state(self) -> Any:
        return {"steps": _plain(self.steps), "evaluations": _plain(self.evaluations)}

    def set_state(self, state: Any) -> None:
        self.steps, self.evaluations = ([(step, dict(found)) for step, found in state[name]] for name in _NAMES)


_NAMES = ("steps", "evaluations")


def _plain(pairs: list[tuple[int, Metrics]]) -> list[Any]:
    return [[step, as_json(found)] for step, found in pairs]
