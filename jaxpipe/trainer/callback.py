"""`Callback`, the base of all that watches a run, and what its methods are given."""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from jaxpipe.engine import Engine

# Names and values on the host: a float where the metric is a scalar, otherwise a NumPy array.
Metrics: TypeAlias = dict[str, Any]


class Running(Protocol):
    """What a callback may ask of the run that it watches."""

    @property
    def engine(self) -> Engine:
        """The engine that is trained."""
        ...

    @property
    def steps(self) -> int | None:
        """The step at which the run ends; None: at the end of the data."""
        ...

    @property
    def began(self) -> int:
        """The number of steps that were done before this run: 0, or those of the checkpoint it goes on from."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this process writes what is the same in all processes: True in the first one."""
        ...

    def stop(self, reason: str) -> None:
        """Asks the run to end after the present step; `Result.reason` has the reason."""
        ...


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
      step: steps of the engine in all, those before this run included.
      began: steps before this run.
      ended: why, in a word: "steps" (all are done), "data" (there are no more), "stopped" (a callback asked for it),
        "preempted" (SIGTERM), or "failed" (an exception, which `Trainer.run` raises).
      reason: the same as a sentence.
      metrics: of the last step of this run; {} if it made none.
      evaluation: what the last evaluation found, that of an earlier run if this one made none; None without any.
      checkpoint: the path of the last checkpoint that this run wrote or began with, or None.
    """

    step: int
    began: int
    ended: str
    reason: str
    metrics: Metrics
    evaluation: Metrics | None
    checkpoint: str | None

    @property
    def ending(self) -> str:
        """When the run ended and why, in a line."""
        return f"{'failed' if self.ended == 'failed' else 'ended'} after step {self.step}: {self.reason}"

    def __str__(self) -> str:
        told = [self.ending]
        for name, found in (("training", self.metrics), ("evaluation", self.evaluation)):
            if found and "loss" in found:
                told.append(f"{name} loss {found['loss']:.4f}")
        if self.checkpoint is not None:
            told.append(f"checkpoint {self.checkpoint}")
        return "\n".join(told)


class Callback:
    """The base of all callbacks; each method does nothing unless it is overridden.

    With several processes every one calls every method, at the same steps and with the same numbers. `run.writes` says
    whether this process is the one to write. A method may call what all processes have to call, such as
    `engine.to_layers`, but not so `on_end`: other processes may be gone by then.
    """

    def on_start(self, run: Running) -> None:
        """Called once, behind `set_state` and in front of the first step."""

    def on_step(self, run: Running, step: int, metrics: Metrics) -> None:
        """Called for each step, in order, some steps later, so that the host never waits for the device.

        All steps up to the present one have been told when one of the methods below is called.

        Args:
          step: its number, from 1.
          metrics: `engine.metrics` of that step, on the host.
        """

    def on_evaluate(self, run: Running, step: int, found: Metrics) -> None:
        """Called after each evaluation with what `engine.evaluate` has found, `step` steps having been made."""

    def on_checkpoint(self, run: Running, step: int, path: str) -> None:
        """Called when a checkpoint is under way. It is written in the background, and complete in front of `on_end`."""

    def on_end(self, run: Running, result: Result) -> None:
        """Called once at the end, for every callback whose `on_start` was called, after an exception too."""

    def get_state(self) -> Any:
        """What a checkpoint has to remember for this callback, as JSON can hold it; None is nothing."""
        return None

    def set_state(self, state: Any) -> None:
        """Gets what `get_state` gave in the run that this one goes on from, in front of `on_start`."""
