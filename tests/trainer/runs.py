"""A run that callbacks can be shown without an engine."""

from dataclasses import dataclass, field
from typing import Any

from jaxpipe.trainer.callback import Result


@dataclass
class FakeRun:
    engine: Any = None
    steps: int | None = 10
    began: int = 0
    writes: bool = True
    reasons: list[str] = field(default_factory=list)

    def stop(self, reason):
        self.reasons.append(reason)


def result(**fields):
    told = {"step": 4, "began": 0, "ended": "steps", "reason": "all 4 steps are done", "metrics": {"loss": 0.5}}
    return Result(**{**told, "evaluation": None, "checkpoint": None, **fields})
