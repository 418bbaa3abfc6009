"""`TensorBoard`: the metrics of a run as event files."""

import os
from typing import Any

from jaxpipe.errors import ConfigError
from jaxpipe.trainer.callback import Running
from jaxpipe.trainer.scalar_writer import ScalarWriter


class TensorBoard(ScalarWriter):
    """Writes event files that `tensorboard --logdir DIRECTORY` shows. It needs tensorboardX, and no TensorFlow.

    A run that goes on from a checkpoint writes another file into the folder, which tells TensorBoard to forget the later
    steps of the files before it.

    Args:
      directory: of the event files; made if need be. One for each run.
      every: write so many steps apart. Evaluations are always written.

    Raises:
      ConfigError: tensorboardX is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str], *, every: int = 1):
        super().__init__(every=every)
        self.directory = os.fspath(directory)
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "callbacks.TensorBoard needs tensorboardX, which is not installed. Run "
                "`pip install 'jaxpipe[tensorboard]'`, or take callbacks.JsonLines."
            ) from error
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def open(self, run: Running) -> None:
        self._writer = self._make(self.directory, purge_step=run.began + 1 if run.began else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
