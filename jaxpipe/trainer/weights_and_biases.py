"""`WandB`: the metrics of a run at Weights & Biases."""

from typing import Any

from jaxpipe.errors import ConfigError
from jaxpipe.trainer.callback import Running
from jaxpipe.trainer.scalar_writer import ScalarWriter


class WandB(ScalarWriter):
    """Logs to Weights & Biases: `WandB(project="gpt", name="first")`. It needs wandb.

    A run that goes on from a checkpoint goes on there in the run of the same id. Values are plotted over the value `step`,
    so that steps that are made again after an interruption may be logged again.

    Args:
      every: log so many steps apart. Evaluations are always logged.
      settings: keywords of `wandb.init`.

    Raises:
      ConfigError: wandb is not installed.
    """

    def __init__(self, *, every: int = 1, **settings: Any):
        super().__init__(every=every)
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # not among what this repository is checked with
        except ImportError as error:
            raise ConfigError(
                "callbacks.WandB needs wandb, which is not installed. Run `pip install 'jaxpipe[wandb]'`, or take "
                "callbacks.JsonLines."
            ) from error
        self._init: Any = wandb.init
        self._settings, self._id, self._run = settings, None, None

    def open(self, run: Running) -> None:
        again = {} if self._id is None else {"id": self._id, "resume": "allow"}
        self._run = self._init(**{**again, **self._settings})
        self._id = self._run.id
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        assert self._run is not None
        self._run.log({"step": step, **{name: float(value) for name, value in values.items()}})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def get_state(self) -> Any:
        return self._id

    def set_state(self, state: Any) -> None:
        self._id = state
