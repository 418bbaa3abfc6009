"""`Trainer`: a training run in a few lines."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint.directory import latest
from jaxpipe.checks import count
from jaxpipe.data.pull import EndOfData
from jaxpipe.engine import Engine
from jaxpipe.errors import ConfigError, JaxpipeError
from jaxpipe.monitor.late import Late
from jaxpipe.processes.group import Group
from jaxpipe.trainer import settings
from jaxpipe.trainer.callback import Callback, Metrics, Result
from jaxpipe.trainer.memory import recall, remember
from jaxpipe.trainer.position import Position
from jaxpipe.trainer.settings import EvalData, TrainData
from jaxpipe.types import Batch, MetricsFn

# Steps that may be under way while the host goes on. An engine of several processes looks at a step two calls later, and
# a step that they have skipped must not be told to callbacks.
UNDER_WAY = 3
# Several processes tell each other at least every so many steps whether a callback wants to stop. It waits for the device.
MEET = 32


class Trainer:
    """Trains an engine: data, evaluations, checkpoints, and callbacks that watch.

        result = jaxpipe.Trainer(engine, train_data, steps=1000, eval_data=test, eval_every=100, checkpoint_dir="run").run()

    If `checkpoint_dir` has a checkpoint, and the engine is new, the run goes on from it: weights, optimizer, callbacks and
    the place in the data are as if it had not been interrupted. With a folder the run also ends well on SIGTERM, which
    machines send before they are taken away: it writes a checkpoint and ends, "preempted". With several processes all of
    them make the same trainer, and run it.

    Args:
      engine: made by `jaxpipe.initialize`.
      train_data: micro-batches (inputs, labels), as for `Engine.train_batch`: an iterator, or a list or loader that makes
        one. To go on, as many micro-batches as were used are taken and dropped; an iterator with `get_state` and
        `set_state`, such as grain's, is set instead. Or a function of the number of micro-batches that were used, which
        returns an iterator over what follows.
      steps: the number of the last step, steps before an interruption included; None: until the data end.
      eval_data: for `Engine.evaluate`: a list, a loader, or a function that makes a new iterator each time.
      eval_every: steps between two evaluations. There is one at the end in any case, if there is `eval_data`.
      eval_first: evaluate in front of the first step of a new run, too. A fault in the evaluation is found then.
      eval_batches: batches per evaluation; None: all.
      metrics: for `Engine.evaluate`.
      checkpoint_dir: the folder of checkpoints. There is one at the end in any case, if there is a folder.
      checkpoint_every: steps between two checkpoints. They are written in the background.
      keep: remove the oldest checkpoints beyond so many; None keeps all.
      resume: False begins anew, whatever the folder has.
      callbacks: see `jaxpipe.callbacks`. They are called in this order.

    Attributes:
      engine, steps: as they were given.
      began: see `jaxpipe.callbacks.Running`.

    Raises:
      ConfigError, DataError, CheckpointError: what was asked for does not go together; nothing has been traced yet.
    """

    def __init__(
        self,
        engine: Engine,
        train_data: TrainData,
        *,
        steps: int | None = None,
        eval_data: EvalData | None = None,
        eval_every: int | None = None,
        eval_first: bool = False,
        eval_batches: int | None = None,
        metrics: MetricsFn | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep: int | None = None,
        resume: bool = True,
        callbacks: Iterable[Callback] = (),
    ):
        settings.check_engine(engine)
        settings.check_data(train_data, eval_data, eval_batches)
        self.engine, self._position = engine, Position(train_data)
        self.steps = (
            None if steps is None else count("Trainer: steps", steps, " Leave it out to train until the data end.")
        )
        self._eval_data, self._metrics = eval_data, metrics
        self._eval_every = settings.cadence("eval_every", eval_every, "eval_data", eval_data)
        self._eval_first = eval_first and eval_data is not None
        self._eval_batches = settings.cadence("eval_batches", eval_batches, "eval_data", eval_data)
        self._folder = settings.folder(checkpoint_dir)
        self._save_every = settings.cadence("checkpoint_every", checkpoint_every, "checkpoint_dir", checkpoint_dir)
        self._keep = settings.cadence("keep", keep, "checkpoint_dir", checkpoint_dir)
        self._resume, self._callbacks = resume, settings.check_callbacks(callbacks)
        self._group, self.began, self._ran = Group.of(engine.pipe.mesh), 0, False
        self._told = Late[tuple[int, dict[str, jax.Array]]]()
        self._stop: str | None = None  # what a callback of this process has asked for
        self._last: Metrics = {}
        self._evaluation: tuple[int, Metrics] | None = None
        self._checkpoint: tuple[int, str] | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes what is the same in all processes."""
        return self._group.first

    def stop(self, reason: str) -> None:
        """Asks the run to end, for callbacks.

        With several processes it is enough if one asks; they end together, at the next evaluation or checkpoint, and after
        32 steps at the latest.
        """
        self._stop = self._stop or reason

    def run(self) -> Result:
        """Trains until the end, or until something ends it sooner.

        Returns:
          What it has come to. If the data have ended it says so, and the micro-batches of an incomplete last step are lost.

        Raises:
          NonFiniteError, DataError, CheckpointError: as the methods of `Engine` do. Callbacks are told of the end, and the
            checkpoints before it are complete.
          ConfigError: it was called before. Make another trainer, which goes on where the engine stands.
        """
        if self._ran:
            raise ConfigError(
                "Trainer.run() was called before. Make another Trainer; it goes on where the engine stands."
            )
        self._ran = True
        data = self._begin()
        started: list[Callback] = []
        ended, reason = "failed", ""
        try:
            for callback in self._callbacks:
                started.append(callback)
                callback.on_start(self)
            if self._eval_first and self.began == 0:
                self._evaluate()
            ended, reason = self._train(data)
            self.engine.settle()
            self._tell(0)
            if ended != "preempted" and self._eval_data is not None and not self._is_at(self._evaluation):
                self._evaluate()
            if self._folder is not None and not self._is_at(self._checkpoint):
                self._save()
            self.engine.wait_for_checkpoint()
        except BaseException as error:
            ended, reason = "failed", f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # the first error is the one to raise
                if isinstance(error, JaxpipeError):  # and none of a callback, which may be unable to hear more
                    self.engine.settle()
                    self._tell(0)
                self.engine.wait_for_checkpoint()
            raise
        finally:
            result = self._result(ended, reason)
            with contextlib.ExitStack() as stack:  # all of them are called, even if one raises
                for callback in reversed(started):
                    stack.callback(callback.on_end, self, result)
        return result

    def _begin(self) -> Iterator[Batch]:
        """Loads the checkpoint to go on from, if there is one, and returns the data from there on."""
        engine, loaded = self.engine, False
        if self._resume and self._folder is not None and engine.train_calls == 0:
            folder = self._folder
            if self._group.broadcast(self._group.first and latest(folder) is not None):
                path, client_state = engine.load_checkpoint(folder, data_iter=self._position.remembered)
                assert path is not None and client_state is not None
                self._checkpoint, loaded = (engine.train_calls, path), True
                self._evaluation = recall(client_state, self._callbacks)
        self.began = engine.train_calls
        return self._position.start(engine.micro_batches_seen, loaded)

    def _train(self, data: Iterator[Batch]) -> tuple[str, str]:
        """Makes steps until there is a reason not to: a word and a sentence."""
        engine = self.engine
        # Only the main thread of a program can listen to signals.
        listens = self._folder is not None and threading.current_thread() is threading.main_thread()
        while True:
            if self.steps is not None and engine.train_calls >= self.steps and engine.settle() >= self.steps:
                return "steps", f"all {self.steps} steps are done"
            reason = self._asked(engine.train_calls)
            if reason is not None:
                return "stopped", reason
            if listens and engine.preempted():
                return "preempted", "the program was asked to end by SIGTERM"
            try:
                with jax.profiler.StepTraceAnnotation("train", step_num=engine.train_calls + 1):
                    engine.train_batch(data)
            except EndOfData as error:
                return "data", f"the data have ended. {error}"
            self._told.add((engine.train_calls, engine.metrics))
            self._tell(UNDER_WAY)
            self._at_cadence(engine.train_calls)

    def _at_cadence(self, step: int) -> None:
        """Evaluates and saves, if it is time to."""
        due = [every is not None and step % every == 0 for every in (self._eval_every, self._save_every)]
        if not any(due) or self.engine.settle() != step:  # the step was skipped: the next one says why
            return
        if due[0]:
            self._evaluate()
        if due[1]:
            self._save()

    def _asked(self, step: int) -> str | None:
        """Why callbacks want to stop, if one does, on any process."""
        if not self._group.several:
            return self._stop
        cadences = [every for every in (MEET, self._eval_every, self._save_every) if every is not None]
        if step != self.began and all(step % every for every in cadences):
            return None
        return next((reason for reason in self._group.gather(self._stop) if reason is not None), None)

    def _tell(self, under_way: int) -> None:
        """Tells callbacks of steps, but for so many that may be under way."""
        for step, metrics in self._told.beyond(under_way):
            if step > self.engine.train_calls:  # it was skipped
                continue
            self._last = {name: _plain(value) for name, value in jax.device_get(metrics).items()}
            for callback in self._callbacks:
                callback.on_step(self, step, dict(self._last))

    def _evaluate(self) -> None:
        self._tell(0)
        given: Any = self._eval_data
        data: Any = given() if settings.is_function(given) else given
        found = self.engine.evaluate(data, self._eval_batches, self._metrics, progress=False)
        self._evaluation = self.engine.train_calls, found
        for callback in self._callbacks:
            callback.on_evaluate(self, self.engine.train_calls, dict(found))

    def _save(self) -> None:
        self._tell(0)
        step, client_state = self.engine.train_calls, remember(self._evaluation, self._callbacks)
        assert self._folder is not None
        path = self.engine.save_checkpoint(
            self._folder,
            client_state=client_state,
            blocking=False,
            keep=self._keep,
            data_iter=self._position.remembered,
        )
        self._checkpoint = step, path
        for callback in self._callbacks:
            callback.on_checkpoint(self, step, path)

    def _is_at(self, last: tuple[int, Any] | None) -> bool:
        """Whether an evaluation or a checkpoint is that of the present step."""
        return last is not None and last[0] == self.engine.train_calls

    def _result(self, ended: str, reason: str) -> Result:
        evaluation = None if self._evaluation is None else self._evaluation[1]
        path = None if self._checkpoint is None else self._checkpoint[1]
        return Result(self.engine.train_calls, self.began, ended, reason, self._last, evaluation, path)


def _plain(value: np.ndarray) -> Any:
    return value.item() if np.ndim(value) == 0 else value
