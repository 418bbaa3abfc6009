"""`JsonLines`: the metrics of a run in a text file, one JSON object per line."""

import json
import math
import os
import time
from pathlib import Path
from typing import TextIO

from jaxpipe.checkpoint.directory import write_text
from jaxpipe.trainer.callback import Running
from jaxpipe.trainer.scalar_writer import ScalarWriter


class JsonLines(ScalarWriter):
    """Writes lines such as `{"step": 7, "time": 1790000000.25, "train/loss": 2.5, "train/grad_norm": 0.9}`.

    `time` is in seconds since 1970. A number that JSON does not have (NaN, infinity) is null. A run that starts anew begins
    the file anew; one that goes on from a checkpoint removes the lines of later steps and appends.

    Args:
      path: of the file; its folder is made if need be.
      every: write so many steps apart. Evaluations are always written.
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1):
        super().__init__(every=every)
        self.path = Path(path)
        self._file: TextIO | None = None

    def open(self, run: Running) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if run.began and self.path.exists():
            write_text(self.path, _up_to(self.path, run.began))
            self._file = self.path.open("a", encoding="utf-8")
        else:
            self._file = self.path.open("w", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        assert self._file is not None
        numbers = {name: float(value) for name, value in values.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **plain}, allow_nan=False) + "\n")

    def flush(self) -> None:
        assert self._file is not None
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _up_to(path: Path, step: int) -> str:
    """The lines of steps that a checkpoint knows of. A line that was cut off as the writer was killed is none."""
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return "".join(kept)
