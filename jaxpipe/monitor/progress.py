"""A progress bar for a training loop that does not make the host wait for the device."""

import shutil
import sys
import time
from typing import Any, Self, TextIO, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.monitor.late import Late
from jaxpipe.processes.first import is_first

__all__ = ["Progress"]

Loss: TypeAlias = jax.Array | np.ndarray | np.generic | float | None
# Without a terminal, a line is written after so many seconds, but not before one in `LINES` parts of the steps is done.
SECONDS_PER_LINE, LINES = 10.0, 100
BAR, NO_BAR = "{percentage:3.0f}%|{bar}| {desc}", "{desc}"


class Progress:
    """Shows how far a loop is: `with Progress(total_steps, tokens_per_step) as bar: bar.update(loss)`.

    `update` takes the loss as a scalar on a device and reads it late: the loss that is shown is the newest one that has
    already been computed. A step counts when it has finished, not when it was dispatched, so the speed is that of the
    device. Only the end of the `with` block waits, for the steps that are still running.

    On a terminal there is a bar, which tqdm draws (the `progress` extra). If the output is a file or a pipe, or tqdm is
    missing, there are plain lines, at least ten seconds apart and about a hundred in all.

    Args:
      total_steps: number of `update` calls to come, and of steps `done` before; None if that is not known.
      tokens_per_step: shows the speed in tokens/s; 0 shows it in steps/s.
      items: the name of what `tokens_per_step` counts, if that is something else.
      unit: the name of what one `update` counts.
      stream: where to write; standard output by default.
      enabled: False shows nothing. With several processes only the first one shows anything.
      mesh: of the engine that is shown: with several processes, the first one that has a part of this mesh counts. Without
        it, that is process 0.
      done: number of steps that were made before this loop, out of `total_steps`.
      seconds_at_peak: what one step would take if the devices did nothing but its arithmetic, at their peak; shows the
        share of that in the time that it does take.

    Attributes:
      finished: number of steps that have finished, those before this loop included.
    """

    def __init__(
        self,
        total_steps: int | None,
        tokens_per_step: int = 0,
        *,
        unit: str = "step",
        stream: TextIO | None = None,
        enabled: bool = True,
        mesh: Mesh | None = None,
        items: str = "tokens",
        done: int = 0,
        seconds_at_peak: float | None = None,
    ):
        self.total_steps, self.tokens_per_step, self.finished, self.unit = total_steps, tokens_per_step, done, unit
        self._items, self._done, self._at_peak = items, done, seconds_at_peak
        self._stream, self._enabled, self._bar = stream or sys.stdout, enabled and is_first(mesh), None
        self._pending, self._loss = Late[Loss](), None
        self._line = time.monotonic(), done  # when the last line was written, and at which step
        self._base: tuple[float, int] | None = None  # when the clock was started, after compilation, and at which step
        if self._enabled and self._stream.isatty():
            self._bar = self._make_bar()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._fetch(wait=True)
            self._show(last=True)
        if self._bar is not None:
            self._bar.close()

    def update(self, loss: Loss) -> None:
        """Counts a step that was dispatched. `loss` is a number, an array [] that need not be computed yet, or None."""
        self._pending.add(loss)
        self._fetch(wait=False)
        self._show(last=False)

    def note(self, text: str) -> None:
        """Writes a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def _make_bar(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return self.note("Plain lines, because tqdm is not installed; for a bar: pip install 'jaxpipe[progress]'.")
        # tqdm must not measure the terminal itself: on one that claims 0 columns or rows it would show nothing.
        width, height = shutil.get_terminal_size()
        return tqdm(
            total=self.total_steps,
            initial=self._done,
            file=self._stream,
            bar_format=NO_BAR if self.total_steps is None else BAR,
            ncols=width,
            nrows=height,
        )

    def _fetch(self, wait: bool) -> None:
        for loss in self._pending.beyond(0) if wait else self._pending.finished():
            self._loss = None if loss is None else float(loss)
            self.finished += 1
        if self._base is None and self.finished > self._done:
            self._base = time.monotonic(), self.finished

    def _show(self, last: bool) -> None:
        now, steps = time.monotonic(), self.finished - self._line[1]
        if self._bar is not None:
            self._bar.set_description_str(self._status(now), refresh=last)
            self._bar.update(self.finished - self._bar.n)
        elif steps and (last or (now - self._line[0] >= SECONDS_PER_LINE and steps >= (self.total_steps or 0) / LINES)):
            self.note(self._status(now))
            self._line = now, self.finished

    def _status(self, now: float) -> str:
        """The text that is shown, such as `step 30/200  loss 2.104  4,500 tokens/s  1:12 left`."""
        text = f"{self.unit} {self.finished}" + ("" if self.total_steps is None else f"/{self.total_steps}")
        base, steps = self._base or (now, self.finished)
        if self.finished and self._loss is not None:
            text += f"  loss {self._loss:.3f}"
        if self.finished == steps or now == base:  # no step since the clock started
            return text
        per_step = (now - base) / (self.finished - steps)
        if self.tokens_per_step:
            text += f"  {self.tokens_per_step / per_step:,.0f} {self._items}/s"
        else:
            text += f"  {1 / per_step:.2f} {self.unit}{'es' if self.unit.endswith('ch') else 's'}/s"
        if self._at_peak is not None:
            text += f"  {100 * self._at_peak / per_step:.0f} % of peak"
        if self.total_steps is None:
            return text
        left = round((self.total_steps - self.finished) * per_step)
        return f"{text}  {left // 60}:{left % 60:02d} left"
