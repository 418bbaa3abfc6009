"""`Engine`: owns the state and the compiled steps. Wiring only."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import load, save
from jaxpipe.checkpoint.homes import Homes
from jaxpipe.checks import as_count, show
from jaxpipe.data.place import pull_batch
from jaxpipe.errors import CheckpointError, DataError
from jaxpipe.evaluation import dataset
from jaxpipe.executor.options import Options
from jaxpipe.monitor.progress import Progress
from jaxpipe.monitor.watch import StepInfo, Watch
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.pipeline import Pipeline
from jaxpipe.training.config import Config
from jaxpipe.training.optimizer import make_step
from jaxpipe.training.state import make_state
from jaxpipe.types import Batch, Key, MetricsFn, Params, Tree


class Engine:
    """Trains and evaluates a `PipelineModule`; made by `initialize`.

    Attributes:
      pipe: the functional core.
      config: the settings.
      optimizer: the optimizer on stacks; `optimizer.natural_state(state.opt_state)` is its state as optax would hold it.
      state: params, optimizer state, step and key, on the mesh. Each `train_batch` donates it and puts a new one here.
      grad_norm: norm of the last step's gradient before clipping (a device scalar), or None.
      train_calls: calls of `train_batch`, those whose step was not finite included.
      micro_batches_seen: how many micro-batches training has taken, checkpoints included: where its data goes on.
    """

    def __init__(self, pipe: Pipeline, optimizer: Layerwise, config: Config, params: Params, key: Key):
        self.pipe, self.config, self.optimizer = pipe, config, optimizer
        self.grad_norm: jax.Array | None = None
        self.state, shardings = make_state(params, optimizer, key, pipe.mesh)
        everywhere = shardings.step
        self._step = jax.jit(
            make_step(pipe.traceable_step, optimizer, config.gradient_clipping),
            donate_argnums=0,
            out_shardings=(shardings, StepInfo(everywhere, everywhere, everywhere)),
        )
        self.train_calls = self.micro_batches_seen = 0
        self._watch, self._shardings, self._saver = Watch(), shardings, save.Saver()

    def train_batch(self, data_iter: Iterator[Batch]) -> jax.Array:
        """One optimizer step on the next M micro-batches.

        Args:
          data_iter: yields (inputs, labels) with the rows of one micro-batch on all data ranks as leading dim.

        Returns:
          The mean loss, a scalar on the device. The host does not wait for it.

        Raises:
          DataError: the iterator ends early or does not fit; the state is unchanged.
          NonFiniteError: an *earlier* step had a loss or gradient that is not finite. That step left the state as it was,
            and this call has not begun: call again to go on. (The check looks only at steps that have finished, so that
            the host never waits.)
        """
        self._watch.raise_if_not_finite()
        inputs, labels = pull_batch(data_iter, self.config.num_micro_batches, self.pipe.mesh)
        self.state, info = self._step(self.state, inputs, labels)
        self.train_calls += 1
        self.micro_batches_seen += self.config.num_micro_batches
        self._watch.add(self.train_calls, info)
        self.grad_norm = info.grad_norm
        every = self.config.steps_per_print
        if every is not None and self.train_calls % every == 0:
            print(f"step {self.train_calls}: loss {float(info.loss):.4f}")
        return info.loss

    def eval_batch(
        self,
        data_iter: Iterator[Batch],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
        *,
        return_metrics: bool = False,
    ) -> Any:
        """Evaluates the next micro-batches of an iterator; the training state is not changed.

        Args:
          data_iter: yields (inputs, labels); labels may be None without `compute_loss`. The micro-batches may differ in
            their rows, and need not be multiples of the data ranks: loss and metrics are exact over the real rows.
          return_logits: also return the outputs of every micro-batch, leaves [M, B, ...], in order; B is that of the
            largest one, and rows that a smaller one does not have are zeros.
          compute_loss: without it only the outputs are returned.
          reduce_output: "avg" is the loss of all micro-batches as one batch, "sum" the sum over micro-batches, None one
            value per micro-batch, [M]. (Of a `Weighted` loss see `Pipeline.evaluate`.)
          bcast_loss: loss and metrics are on all devices; otherwise on those of the last rank only.
          num_micro_batches: M of this call; that of training by default.
          return_metrics: also return the metrics of `loss_fn`, a dict, each joined by its own rule; see `jaxpipe.metrics`.

        Returns:
          `loss`, `(loss, outputs)` or `outputs`; with `return_metrics` the dict behind it.
        """
        options = Options.of(
            return_logits=return_logits,
            compute_loss=compute_loss,
            reduce_output=reduce_output,
            bcast_loss=bcast_loss,
            return_metrics=return_metrics,
        )
        micro_batches = as_count(self.config.num_micro_batches if num_micro_batches is None else num_micro_batches)
        if micro_batches is None:
            raise DataError(f"num_micro_batches={show(num_micro_batches)} must be an integer, 1 or more.")
        evaluator = self.pipe.evaluator
        groups = dataset.groups(data_iter, micro_batches, evaluator, compute_loss)
        return evaluator.run(self.state.params, groups, options).answer(options)

    def evaluate(
        self,
        data_iter: Iterable[Batch],
        num_batches: int | None = None,
        metrics: MetricsFn | None = None,
        *,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Evaluates a whole data set.

        The mean is taken over all rows of the data set (of a `Weighted` loss: all totals over all weights), however unlike
        the micro-batches are in size. While a batch runs, the next one is on its way to the devices.

        Args:
          data_iter: yields micro-batches (inputs, labels), of any number of rows; an iterator or anything that makes one,
            such as a list or a loader. M of them, as many as in training, are one batch; the last one may have fewer.
          num_batches: stop after so many batches; None: at the end of the data.
          metrics: `metrics(outputs, labels)` gives more metrics than `loss_fn` does, in the same form. Pass the same
            function in every call: another one compiles again. If the module has no `loss_fn`, there is no loss then.
          progress: show a progress bar; None: if the output is a terminal.

        Returns:
          `{"loss": ..., name of each metric: ...}`, Python numbers, numpy arrays where a metric is an array.

        Raises:
          DataError: there is no data, or it does not fit, or the weights of a `Weighted` loss add up to 0 over all of it.
        """
        has_loss = self.pipe.module.loss_fn is not None or metrics is None
        options = Options(loss=has_loss, metrics=True, metrics_fn=metrics, reduce_output=None, raw=True)
        evaluator, micro_batches = self.pipe.evaluator, self.config.num_micro_batches
        source = dataset.batches(data_iter, micro_batches, num_batches, evaluator, labels=True)
        bar = Progress(
            dataset.number_of_batches(data_iter, micro_batches, num_batches),
            unit="batch",
            enabled=sys.stdout.isatty() if progress is None else progress,
        )
        return dataset.evaluate(evaluator, self.state.params, source, options, bar)

    def predict(self, data_iter: Iterable[Batch], num_batches: int | None = None) -> Iterator[Tree]:
        """The outputs for a whole data set, batch by batch.

        Args:
          data_iter: as for `evaluate`; labels are not looked at.
          num_batches: stop after so many batches; None: at the end of the data.

        Yields:
          Outputs with leaves [M, B, ...], in order, on the devices of the last rank; the next batch is being computed
          meanwhile. Micro-batches with another number of rows than those before them begin a batch of their own.
        """
        evaluator = self.pipe.evaluator
        source = dataset.batches(data_iter, self.config.num_micro_batches, num_batches, evaluator, labels=False)
        options = Options.of(return_logits=True, compute_loss=False)
        return dataset.predict(evaluator, lambda: self.state.params, source, options)

    @property
    def global_steps(self) -> int:
        """Optimizer steps taken. Reading it waits for the device."""
        return int(self.state.step)

    @property
    def partition(self) -> tuple[int, ...]:
        """Boundaries of the stages."""
        return self.pipe.partition

    def to_layers(self) -> list[Params]:
        """Per layer, in order, its own params, as copies that outlive the next `train_batch` (which donates the state)."""
        own = {id(leaf) for leaf in jax.tree.leaves(self.state.params)}
        return jax.tree.map(lambda a: jnp.copy(a) if id(a) in own else a, self.pipe.to_layers(self.state.params))

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self,
        directory: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        blocking: bool = True,
        *,
        keep: int | None = None,
        data_iter: Any = None,
    ) -> str:
        """Writes the whole training state, one item per layer, so that it loads at any number of stages.

        A writer that dies at any moment leaves the directory loadable: a checkpoint is there when all of it is.

        Args:
          directory: of a mounted file system; made if need be.
          tag: name of the checkpoint; `global_step<N>` by default. One of that name is replaced.
          client_state: a dict that `load_checkpoint` returns: numbers, strings, lists, dicts.
          save_latest: make it the one that loads without a tag.
          blocking: False returns as soon as the state is copied to the host, and writes in the background. The next
            `save_checkpoint` waits for it. What goes wrong is logged when it happens, and raised by
            `wait_for_checkpoint`. Call that before the program ends, or the last checkpoint is lost.
          keep: remove the oldest checkpoints beyond so many.
          data_iter: its `get_state()` is stored (grain's iterators have one), for `load_checkpoint` to set.

        Returns:
          The path of the checkpoint.

        Raises:
          CheckpointError: it cannot be written. Training can go on.
        """
        homes = self._homes()
        made = save.describe(
            homes,
            self.state,
            self.config,
            self.pipe.mesh,
            client_state=save.check_arguments(client_state, keep),
            data_state=save.data_state(data_iter),
            train_calls=self.train_calls,
            micro_batches_seen=self.micro_batches_seen,
        )
        return str(
            self._saver.save(
                folders.as_directory(directory),
                folders.check_tag(f"global_step{made.step}" if tag is None else tag),
                made,
                homes.items(self.state),
                save_latest=save_latest,
                keep=keep,
                blocking=blocking,
            )
        )

    def load_checkpoint(
        self,
        directory: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_module_only: bool = False,
        *,
        data_iter: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Loads a checkpoint that was written at any number of stages and data ranks, with any schedule.

        Args:
          directory, tag: of `save_checkpoint`; tag None is the latest one.
          load_module_strict: False loads what fits the model by name, keeps the present value of what is missing, and
            warns. Shapes and dtypes have to agree all the same.
          load_optimizer_states: False keeps the present optimizer state.
          load_module_only: load the weights, and neither optimizer state nor counters nor PRNG key.
          data_iter: gets the stored state back by `set_state`.

        Returns:
          The path of the checkpoint and its client state; `(None, None)`, and a warning, if there is no directory or it
          has no `latest`.

        Raises:
          CheckpointError: it is damaged, or of another model or optimizer; the engine is as it was. (Only if the devices
            fail at the very end, when all has been read and compared, it is not, and the message says so.)
        """
        self._saver.join()
        selection = load.Selection(load_module_strict, load_optimizer_states, load_module_only)
        found = load.load(folders.as_directory(directory), tag, self._homes(), self.state, selection)
        if found is None:
            return None, None
        load.restore_data(data_iter, found)
        self.state, error = found.state.place(self.state, self._shardings)
        self._watch.clear()
        if error is not None:
            raise CheckpointError(
                f"{found.path}: it was read, but could not be put on the devices ({type(error).__name__}: {error}). Part "
                "of the engine's state is new and part is old: load again before going on."
            ) from error
        if not load_module_only:
            self.train_calls, self.micro_batches_seen = found.manifest.train_calls, found.manifest.micro_batches_seen
        return str(found.path), found.manifest.client_state

    def wait_for_checkpoint(self) -> None:
        """Waits for a checkpoint that is being written in the background; raises CheckpointError if it failed."""
        self._saver.wait()

    def _homes(self) -> Homes:
        return Homes(self.pipe.layout, self.state, self.optimizer.plan)
