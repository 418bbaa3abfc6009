"""`Engine`: owns the state and the compiled steps. Wiring only."""

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpipe.errors import DataError, NonFiniteError
from jaxpipe.evaluation import dataset
from jaxpipe.evaluation.evaluator import answer, options_of
from jaxpipe.executor.batch import check_batch
from jaxpipe.executor.evaluate import Options
from jaxpipe.executor.tally import MetricsFn
from jaxpipe.mesh import data_size
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.shapes import aval, describe
from jaxpipe.pipeline import Batch, Pipeline
from jaxpipe.training import data
from jaxpipe.training.checks import is_count
from jaxpipe.training.config import Config
from jaxpipe.training.optimizer import StepInfo, make_step
from jaxpipe.training.progress import Progress
from jaxpipe.training.state import TrainState, make_state


class Engine:
    """Trains and evaluates a `PipelineModule`; made by `initialize`.

    Attributes:
      pipe: the functional core.
      config: the settings.
      state: params, optimizer state, step and key, on the mesh. Each `train_batch` donates it and puts a new one here.
      grad_norm: norm of the last step's gradient before clipping (a device scalar), or None.
    """

    def __init__(
        self, pipe: Pipeline, optimizer: optax.GradientTransformation, config: Config, params: Any, key: jax.Array
    ):
        self.pipe, self.config = pipe, config
        self.grad_norm: jax.Array | None = None
        self.state, shardings = make_state(params, optimizer, key, pipe.mesh)
        everywhere = shardings.step
        self._step = jax.jit(
            make_step(pipe.traceable_value_and_grad, optimizer, config.gradient_clipping),
            donate_argnums=0,
            out_shardings=(shardings, StepInfo(everywhere, everywhere, everywhere)),
        )
        self._calls = 0
        self._unchecked: deque[tuple[int, StepInfo]] = deque()

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
        self._raise_if_not_finite()
        batch = self._pull(data_iter, self.config.num_micro_batches)
        inputs, labels, _ = check_batch(batch, self.config.num_micro_batches, self.pipe.mesh)
        self.state, info = self._step(self.state, inputs, labels)
        self._calls += 1
        self._unchecked.append((self._calls, info))
        self.grad_norm = info.grad_norm
        every = self.config.steps_per_print
        if every is not None and self._calls % every == 0:
            print(f"step {self._calls}: loss {float(info.loss):.4f}")
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
            value per micro-batch, [M].
          bcast_loss: loss and metrics are on all devices; otherwise on those of the last rank only.
          num_micro_batches: M of this call; that of training by default.
          return_metrics: also return the metrics of `loss_fn`, a dict, each joined by its own rule; see `jaxpipe.metrics`.

        Returns:
          `loss`, `(loss, outputs)` or `outputs`; with `return_metrics` the dict behind it.
        """
        options = options_of(return_logits, compute_loss, reduce_output, bcast_loss, return_metrics)
        count = self.config.num_micro_batches if num_micro_batches is None else num_micro_batches
        if not is_count(count):
            raise DataError(f"num_micro_batches={count!r} must be an integer, 1 or more.")
        evaluator = self.pipe.evaluator
        groups = dataset.checked(data.put(data.pull(data_iter, count), self.pipe.mesh), evaluator, compute_loss)
        return answer(evaluator.run(self.state.params, groups, options), options)

    def evaluate(
        self,
        data_iter: Iterable[Batch],
        num_batches: int | None = None,
        metrics: MetricsFn | None = None,
        *,
        progress: bool | None = None,
    ) -> dict[str, Any]:
        """Evaluates a whole data set.

        The mean is taken over all rows of the data set (with a (sum, weight) loss over all weights), however unlike the
        micro-batches are in size. While a batch runs, the next one is on its way to the devices.

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
          DataError: there is no data, or it does not fit.
        """
        has_loss = self.pipe.module.loss_fn is not None or metrics is None
        options = Options(loss=has_loss, metrics=True, metrics_fn=metrics, reduce_output=None, raw=True)
        evaluator, count = self.pipe.evaluator, self.config.num_micro_batches
        total = -(-len(data_iter) // count) if isinstance(data_iter, Sized) else num_batches
        bar = Progress(
            total if num_batches is None or total is None else min(total, num_batches),
            unit="batch",
            enabled=sys.stdout.isatty() if progress is None else progress,
        )
        source = dataset.batches(data_iter, count, num_batches, evaluator, labels=True)
        return dataset.evaluate(evaluator, self.state.params, source, options, bar)

    def predict(self, data_iter: Iterable[Batch], num_batches: int | None = None) -> Iterator[Any]:
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
        options = options_of(True, False, None, True)
        return dataset.predict(evaluator, lambda: self.state.params, source, options)

    @property
    def global_steps(self) -> int:
        """Optimizer steps taken. Reading it waits for the device."""
        return int(self.state.step)

    @property
    def partition(self) -> tuple[int, ...]:
        """Boundaries of the stages."""
        return self.pipe.partition

    def to_layers(self) -> list[Any]:
        """Per layer, in order, its own params, as copies that outlive the next `train_batch` (which donates the state)."""
        own = {id(leaf) for leaf in jax.tree.leaves(self.state.params)}
        return jax.tree.map(lambda a: jnp.copy(a) if id(a) in own else a, self.pipe.to_layers(self.state.params))

    def _pull(self, data_iter: Iterator[Batch], count: int) -> Batch:
        items = data.pull(data_iter, count)
        data.check_alike(items)
        return data.stack(items, self.pipe.mesh)

    def _may_look(self) -> bool:
        """Whether to look at the oldest unchecked step: when it has finished, so that the host never waits.

        Several processes must look at the same steps, or one would raise and leave the others waiting for it. They look
        at every step two calls later instead.
        """
        if jax.process_count() > 1:
            return len(self._unchecked) > 2
        finite: Any = self._unchecked[0][1].finite
        return finite.is_ready()

    def _raise_if_not_finite(self) -> None:
        while self._unchecked and self._may_look():
            call, info = self._unchecked.popleft()
            if not bool(info.finite):
                loss, norm = float(info.loss), float(info.grad_norm)
                what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} (loss {loss})"
                raise NonFiniteError(
                    f"Step {call} had the {what}. It did not change the state: params, optimizer state and step are those "
                    "from before it. Look at the data of that step, lower the learning rate, or clip gradients; call "
                    "train_batch again to go on with the next batch."
                )


def initialize(
    module: PipelineModule,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    example: Batch,
    config: Config | Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
    layers: Sequence[Any] | None = None,
) -> Engine:
    """Makes an engine.

    Args:
      module: the layers and their loss.
      optimizer: any optax gradient transformation. It sees the params tree of `Pipeline.init`, in which layers of one
        kind are stacked: rules that look at single values (adam, sgd, weight decay, the global norm) act as they would
        layer by layer; rules that look at the rank or the norm of each array (masks by ndim, lamb, adafactor) act on
        stacks.
      mesh: see `make_mesh`.
      example: one micro-batch (inputs, labels), arrays or ShapeDtypeStruct; labels may be None if nothing needs them.
      config: a `Config`, or a dict of its fields.
      key: PRNG key of weights and dropout; `jax.random.key(0)` by default.
      layers: per-layer params to start from, instead of fresh ones.

    Raises:
      JaxpipeError: something does not fit; the message says what, the rule, and the way out.
    """
    config = Config.make(config)
    pipe = Pipeline(module, mesh, config.num_micro_batches, config.schedule, config.remat)
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise DataError("example is one micro-batch: a pair (inputs, labels) of arrays or jax.ShapeDtypeStruct.")
    for leaf in jax.tree.leaves(example):
        shape = aval(leaf).shape
        if not shape or shape[0] % data_size(mesh):
            raise DataError(
                f"The example has a leaf {describe(leaf)}, whose rows cannot be split evenly over {data_size(mesh)} data "
                "ranks. The leading dim of an example is the rows of one micro-batch on all data ranks."
            )
    key = jax.random.key(0) if key is None else key
    pipe.check(example)
    params = pipe.init(key, example[0]) if layers is None else pipe.from_layers(layers)
    return Engine(pipe, optimizer, config, params, key)


__all__ = ["Engine", "TrainState", "initialize"]
