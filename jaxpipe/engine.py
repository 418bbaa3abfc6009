"""`Engine`: owns the state and the compiled steps. Wiring only."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.checkpoint import load, save
from jaxpipe.checkpoint.homes import Homes
from jaxpipe.checks import as_count, show
from jaxpipe.data.agree import Agreement
from jaxpipe.data.feed import Feed
from jaxpipe.data.share import Share
from jaxpipe.errors import DataError
from jaxpipe.evaluation import dataset
from jaxpipe.executor.options import Options
from jaxpipe.model.keys import as_key
from jaxpipe.monitor.watch import Watch
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.pipeline import Pipeline
from jaxpipe.processes import preemption, watchdog
from jaxpipe.summary.text import summarize
from jaxpipe.training.config import Config
from jaxpipe.training.start import make_start, trace_step
from jaxpipe.types import Batch, Key, MetricsFn, Params, Tree


class Engine:
    """Trains and evaluates a `PipelineModule`; made by `initialize`.

    Attributes:
      pipe: the functional core.
      config: the settings.
      optimizer: the optimizer on stacks; `optimizer.natural_state(state.opt_state)` is its state as optax would hold it.
      state: params, optimizer and layer state, step and key, on the mesh. Each `train_batch` donates it and puts a new one
        here.
      grad_norm: norm of the last step's gradient before clipping (a device scalar), or None.
      metrics: of the last step, as device scalars: "loss", "grad_norm", and "loss_scale" where there is one; {} before it.
      train_calls: calls of `train_batch`, those whose step was not finite included.
      micro_batches_seen: how many micro-batches training has taken, checkpoints included: where its data goes on.
    """

    def __init__(
        self, pipe: Pipeline, optimizer: Layerwise, config: Config, params: Params, key: Key, layer_state: Tree
    ):
        self.pipe, self.config, self.optimizer = pipe, config, optimizer
        self.grad_norm: jax.Array | None = None
        self.metrics: dict[str, jax.Array] = {}
        start = make_start(pipe.traceable_step, params, optimizer, key, pipe.mesh, config, layer_state)
        self.state, self._shardings, self._step = start
        self.train_calls = self.micro_batches_seen = 0
        share = Share(pipe.mesh, config.local_rows)
        self._feed, self._agreement = Feed(share, config.num_micro_batches), Agreement(share)
        self._watch, self._saver = Watch(lambda steps: self._count(-steps)), save.Saver()

    @watchdog.doing("in train_batch")
    def train_batch(self, data_iter: Iterator[Batch]) -> jax.Array:
        """One optimizer step on the next M micro-batches.

        Args:
          data_iter: yields (inputs, labels) with the rows of one micro-batch on all data ranks as leading dim.

        Returns:
          The mean loss, a scalar on the device. The host does not wait for it.

        Raises:
          DataError: the iterator ends early or does not fit; the state is unchanged. With several processes all of them
            raise it in the same call, which may be one of the next three. Steps that were skipped are not counted, and
            their loss is NaN.
          NonFiniteError: an *earlier* step had a loss or gradient that is not finite. That step left the state as it was,
            and this call has not begun: call again to go on. (The check looks only at steps that have finished, so that
            the host never waits.) With a dynamic loss scale such a step is skipped without an error, unless many in a row
            overflow at its minimum.
        """
        self._watch.raise_late()
        fed = self._feed.next(data_iter)
        self.pipe.shapes_seen.add((fed.inputs, fed.labels))
        self.state, info = self._step(self.state, fed.inputs, fed.labels, fed.answer)
        self._count(1)
        self._watch.add(self.train_calls, info, fed.fault)
        watchdog.began(self._feed.share.group.members, "step", f"step {self.train_calls}", info.finite)
        self.grad_norm, self.metrics = info.grad_norm, info.metrics()
        every = self.config.steps_per_print
        if every is not None and self.train_calls % every == 0 and self._feed.share.group.first:
            print(f"step {self.train_calls}: loss {float(info.loss):.4f}")
        return info.loss

    def lower_train(self, batch: Batch) -> jax.stages.Lowered:
        """The whole training step, optimizer included, traced and lowered; nothing runs, and the state stays as it is.

        `.compile().memory_analysis()` says what it takes, and `.compile().as_text()` what the compiler made of it. (With
        several processes a step of `train_batch` also looks whether they agree about their data; this one does not.)

        Args:
          batch: (inputs, labels), arrays or ShapeDtypeStruct, leaves [M, B, ...] with the rows of all data ranks.

        Raises:
          DataError: the batch does not fit M or the data ranks.
        """
        return trace_step(self._step, self.state, batch, self.config.num_micro_batches, self.pipe.mesh).lower()

    def settle(self) -> int:
        """Takes back the count of steps that several processes have skipped together, because the data of one had ended.

        For those who look at `train_calls` or the weights between two steps: a step that is still running may yet be
        skipped. With several processes it waits for the device. The error comes from the next `train_batch`.

        Returns:
          `train_calls`.
        """
        self._watch.settle()
        return self.train_calls

    def _count(self, steps: int) -> None:
        self.train_calls += steps
        self.micro_batches_seen += steps * self.config.num_micro_batches

    @watchdog.doing("in eval_batch")
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
          bcast_loss: loss and metrics are on all devices; otherwise on those of the last rank only, and None in a process
            that has none of them.
          num_micro_batches: M of this call; that of training by default.
          return_metrics: also return the metrics of `loss_fn` and of the layers, a dict, each joined by its own rule; see
            `jaxpipe.metrics`. Without `compute_loss` they are those of the layers.

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
        groups = dataset.groups(data_iter, micro_batches, self._agreement, compute_loss)
        return evaluator.run(self.state.params, groups, options, self.state.layer_state).answer(options)

    @watchdog.doing("in evaluate")
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
          progress: show a progress bar; None: if the output is a terminal. The first process shows it.

        Returns:
          `{"loss": ..., name of each metric: ...}`, Python numbers, numpy arrays where a metric is an array.

        Raises:
          DataError: there is no data, or it does not fit, or the weights of a `Weighted` loss add up to 0 over all of it.
        """
        has_loss = self.pipe.module.loss_fn is not None or metrics is None
        options = Options(loss=has_loss, metrics=True, metrics_fn=metrics, reduce_output=None, raw=True)
        evaluator, micro_batches = self.pipe.evaluator, self.config.num_micro_batches
        source = dataset.batches(data_iter, micro_batches, num_batches, self._agreement, labels=True)
        bar = dataset.bar(data_iter, micro_batches, num_batches, evaluator, progress)
        return dataset.evaluate(evaluator, self.state.params, source, options, bar, self.state.layer_state)

    def predict(self, data_iter: Iterable[Batch], num_batches: int | None = None) -> Iterator[Tree]:
        """The outputs for a whole data set, batch by batch.

        Args:
          data_iter: as for `evaluate`; labels are not looked at.
          num_batches: stop after so many batches; None: at the end of the data.

        Yields:
          Outputs with leaves [M, B, ...], in order, on the devices of the last rank (see `holds_outputs` and
          `jaxpipe.fetch`); the next batch is being computed
          meanwhile. Micro-batches with another number of rows than those before them begin a batch of their own.
        """
        evaluator = self.pipe.evaluator
        source = dataset.batches(data_iter, self.config.num_micro_batches, num_batches, self._agreement, labels=False)
        options = Options.of(return_logits=True, compute_loss=False)
        return dataset.predict(evaluator, lambda: (self.state.params, self.state.layer_state), source, options)

    @watchdog.doing("in generate")
    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop: int | None = None,
        key: jax.Array | int | None = None,
    ) -> Any:
        """Continues prompts [N, T] with the present weights: int32 [N, T + max_new_tokens]; see `Pipeline.generate`."""
        held = self.state
        rules = max_new_tokens, temperature, top_k, stop, key
        return self.pipe.generate(held.params, prompts, *rules, layer_state=held.layer_state)

    def preempted(self) -> bool:
        """Whether the program was asked to end, by SIGTERM; to be called once per step, by every process.

        Cloud machines and schedulers send SIGTERM some time before they take a machine away. With several processes it does
        not matter which of them gets it: all return True at the same call, and from then on. The first call begins to
        listen; before it, SIGTERM ends a program of one process as usual. To use it:

            if engine.preempted():
                engine.save_checkpoint(directory)
                break

        Raises:
          ConfigError: there are several processes, and `jaxpipe.start` was not called.
        """
        return preemption.preempted()

    @property
    def global_steps(self) -> int:
        """Optimizer steps taken. Reading it waits for the device."""
        return int(self.state.step)

    @property
    def skipped_steps(self) -> int:
        """Steps that a dynamic loss scale has skipped because they overflowed. Reading it waits for the device."""
        return 0 if self.state.loss_scale is None else int(self.state.loss_scale.skipped)

    @property
    def holds_outputs(self) -> bool:
        """Whether this process has devices of the last rank, so that it holds a part of what that returns."""
        return self.pipe.evaluator.holds_outputs

    @property
    def partition(self) -> tuple[int, ...]:
        """Boundaries of the stages."""
        return self.pipe.partition

    def summary(self) -> str:
        """A text: layers, parameters and FLOPs of each stage and kind, where weights are and why, bytes on each device."""
        return summarize(self.pipe, self.config, self.state)

    def to_layers(self) -> list[Params]:
        """Per layer, in order, its own params, as copies that outlive the next `train_batch` (which donates the state)."""
        return _copied(self.pipe.to_layers(self.state.params), self.state.params)

    def layer_state(self) -> list[Tree]:
        """Per layer, in order, its state, such as running means, as copies that outlive the next `train_batch`.

        Of a flax.nnx module it is a nested dict by attributes, of a flax.linen module a dict of collections, such as
        `{"batch_stats": {...}}`, of a stateful `Layer` what its `init` makes; and `{}` for a layer without state, or a
        later use of a tied one. `initialize(..., layer_state=...)` takes such a list.
        """
        held = self.state.layer_state
        return _copied(self.pipe.to_layers(held), held) if held else [{} for _ in self.pipe.module.layers]

    def modules(self) -> list[Any]:
        """The layers with their present weights, as flax modules: new ones, which nothing of the engine shares.

        Returns:
          One entry per layer. For a module that was built already, and for a `LayerSpec` of one, a module of that type. All
          layers that share their weights, by a tie or because they name one module, have the same object, also where the
          list has a method of it. linen modules are bound to their params and state. A `Layer` has its params, and a
          function is itself. The arrays lie where those of `to_layers` do.
        """
        return self.pipe.module.modules(self.to_layers(), self.layer_state(), as_key(self.state.key))

    # -------------------------------------------------------------------------------------------------- checkpoints

    @watchdog.doing("in save_checkpoint")
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

        A writer that dies at any moment leaves the directory loadable: a checkpoint is there when all of it is. With
        several processes all of them call it, with the same arguments; each writes its part, and all succeed or raise.

        Args:
          directory: of a mounted file system, which all processes share; made if need be.
          tag: name of the checkpoint; `global_step<N>` by default. One of that name is replaced.
          client_state: a dict that `load_checkpoint` returns: numbers, strings, lists, dicts; that of the first process.
          save_latest: make it the one that loads without a tag.
          blocking: False returns as soon as the state is copied to the host, and writes in the background. The next
            `save_checkpoint` waits for it. What goes wrong is logged when it happens, and raised by
            `wait_for_checkpoint`. Call that before the program ends, or the last checkpoint is lost.
          keep: remove the oldest checkpoints beyond so many.
          data_iter: its `get_state()` is stored (grain's iterators have one), for `load_checkpoint` to set. If those of
            several processes stand at different places, that needs as many processes.

        Returns:
          The path of the checkpoint.

        Raises:
          CheckpointError: it cannot be written. Training can go on.
        """
        self._watch.settle()
        request = save.Request(directory, tag, client_state, save_latest, blocking, keep, data_iter)
        counters = {"train_calls": self.train_calls, "micro_batches_seen": self.micro_batches_seen}
        return str(self._saver.save(request, self._homes(), self.state, self.config, **counters))

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
        """Loads a checkpoint that was written at any number of stages, data ranks and processes, with any schedule.

        With several processes all of them call it, with the same arguments; they load the same checkpoint, or all raise.

        Args:
          directory: that of `save_checkpoint`.
          tag: that of `save_checkpoint`; None is the latest one.
          load_module_strict: False loads what fits the model by name, keeps the present value of what is missing, and
            warns. Shapes and dtypes have to agree all the same.
          load_optimizer_states: False keeps the present optimizer state.
          load_module_only: load weights and layer state, and neither optimizer state nor counters nor PRNG key.
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
        homes = self._homes()
        found = load.load(directory, tag, homes, self.state, self._shardings, selection)
        if found is None:
            return None, None
        load.restore_data(data_iter, found, homes.shares.group)
        self.state, error = load.place(found, self.state, homes)
        self._watch.clear()
        if error is not None:
            raise error
        if not load_module_only:
            self.train_calls, self.micro_batches_seen = found.manifest.train_calls, found.manifest.micro_batches_seen
        return str(found.path), found.manifest.client_state

    def wait_for_checkpoint(self) -> None:
        """Waits for a checkpoint that is being written in the background; raises CheckpointError if it failed."""
        self._saver.wait()

    def _homes(self) -> Homes:
        return Homes(self.pipe.layout, self.state, self.optimizer.plan, self.pipe.mesh)


def _copied(tree: Tree, state: Tree) -> Tree:
    """A tree with copies of those of its leaves that are leaves of the state, which the next step donates."""
    own = {id(leaf) for leaf in jax.tree.leaves(state)}
    return jax.tree.map(lambda a: jnp.copy(a) if id(a) in own else a, tree)
