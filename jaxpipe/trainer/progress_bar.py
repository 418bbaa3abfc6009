"""`ProgressBar`: how far a run is, on the terminal or in a log."""

from collections.abc import Mapping
from typing import TextIO

from jaxpipe.monitor.progress import Progress
from jaxpipe.trainer.callback import Callback, Metrics, Result, Running
from jaxpipe.trainer.work import Work, chip_for, work_of


class ProgressBar(Callback):
    """Shows step, loss, speed, utilisation and the time left; a line more for each evaluation. See `jaxpipe.Progress`.

    The speed is in tokens/s where the first input is an array of integers [B, L], otherwise in rows/s. Utilisation is the
    share of the peak of all chips that the model alone takes: the FLOPs of a forward and a backward as XLA counts them,
    without what is computed twice, over the peak of the makers for bfloat16. It is left out where the chip is not known.

    Args:
      chip: a name such as "v5e" or "h100", or a dict as `jaxpipe.plan` takes it; None: the chips of the mesh.
      tokens_per_step: in the place of the count of the inputs, such as without the tokens that only pad.
      stream: where to write; standard output by default.

    Raises:
      ConfigError: the chip is not known.
    """

    def __init__(
        self,
        *,
        chip: str | Mapping[str, float] | None = None,
        tokens_per_step: int | None = None,
        stream: TextIO | None = None,
    ):
        self._chip, self._tokens, self._stream = chip_for(chip), tokens_per_step, stream
        self._bar: Progress | None = None

    def on_start(self, run: Running) -> None:
        pipe = run.engine.pipe
        work = work_of(pipe, self._chip) if run.writes else Work(0, "rows", None)
        count, name = (work.items, work.name) if self._tokens is None else (self._tokens, "tokens")
        self._bar = Progress(
            run.steps,
            count,
            stream=self._stream,
            mesh=pipe.mesh,
            items=name,
            done=run.began,
            seconds_at_peak=work.seconds_at_peak,
        )
        if run.began:
            self._bar.note(f"going on behind step {run.began}")

    def on_step(self, run: Running, step: int, metrics: Metrics) -> None:
        assert self._bar is not None
        self._bar.update(metrics["loss"])

    def on_evaluate(self, run: Running, step: int, found: Metrics) -> None:
        assert self._bar is not None
        values = (f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float))
        self._bar.note(f"step {step}: evaluation: {', '.join(values)}")

    def on_end(self, run: Running, result: Result) -> None:
        if self._bar is not None:
            self._bar.__exit__(None)
            self._bar.note(result.ending)
