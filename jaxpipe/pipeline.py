"""`Pipeline`: the functional core. Pure functions of params and a batch, ready for a hand-written training loop."""

import inspect
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpipe import schedules
from jaxpipe.checks import count, show
from jaxpipe.data.check import check_batch, check_example
from jaxpipe.data.leaves import check_rows, check_types, named, paths
from jaxpipe.errors import ConfigError, LayerError
from jaxpipe.evaluation.evaluator import Evaluator, with_places
from jaxpipe.executor.options import Options
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.executor.remat import RematOption, check_remat
from jaxpipe.executor.train import StepResult
from jaxpipe.executor.train import value_and_grad as _value_and_grad
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import Program
from jaxpipe.mesh import pipe_size
from jaxpipe.model.init import init_params
from jaxpipe.model.keys import as_key
from jaxpipe.model.layout import Layout, check_layers, check_params
from jaxpipe.model.module import LayerShapes, PipelineModule
from jaxpipe.model.shapes import avals
from jaxpipe.optimizer.transformation import LayerwiseTransformation
from jaxpipe.schedules import Schedule
from jaxpipe.types import Batch, Key, Params, Tree


class Pipeline:
    """A module put on a mesh under a schedule.

    Args:
      module: the layers and their loss.
      mesh: with the axis "pipe", and usually "data"; see `make_mesh`.
      num_micro_batches: M of a training batch.
      schedule: "1f1b", "eager_1f1b", "gpipe", a `Schedule`, or the path of a CSV.
      remat: what the backward pass recomputes. "layer" saves the input of each layer, "stage" that of the stage, an
        interval k that of every k-th layer; "none" saves all that is needed; or a `jax.checkpoint` policy, per layer.
    """

    def __init__(
        self,
        module: PipelineModule,
        mesh: Mesh,
        num_micro_batches: int = 1,
        schedule: str | Schedule | os.PathLike[str] = "1f1b",
        remat: RematOption = "layer",
        *,
        poison: bool = False,
    ):
        if not isinstance(module, PipelineModule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise LayerError(
                f"module={show(module)}: expected a jaxpipe.PipelineModule. Write jaxpipe.PipelineModule(layers, loss_fn)."
            )
        self.module, self.mesh, self.num_stages = module, mesh, pipe_size(mesh)
        self.num_micro_batches = count("num_micro_batches", num_micro_batches)
        self.remat = check_remat(remat)
        self.schedule = schedules.get(schedule, self.num_stages, self.num_micro_batches)
        self.program: Program = lower(self.schedule)
        self._poison = poison
        self._layout: Layout | None = None
        self._train = jax.jit(lambda *args: tuple(self.traceable_step(*args)))
        self.evaluator = Evaluator(lambda: self.layout, mesh)

    # ------------------------------------------------------------------------------------------------------- params

    def init(self, key: jax.Array | int, example_inputs: Tree) -> Params:
        """Makes the params on the mesh, each rank its own.

        Args:
          key: PRNG key, or an integer seed. The weights of a layer depend on it and on the layer's index, not on the number
            of stages.
          example_inputs: one micro-batch of inputs (arrays or ShapeDtypeStruct).

        Returns:
          `{"stacked": {kind: leaves [S, slots, ...]}, "shared": {layer: leaves}}`; see `to_layers` for the per-layer view.
        """
        root = as_key(key)
        check_types(leaves := named(example_inputs))
        check_rows(leaves, 0, 1, "The example: ")
        shapes = self.module.shapes(example_inputs, mesh=self.mesh)
        return init_params(self._cut([s.params for s in shapes], shapes), self.mesh, root, shapes)

    @property
    def partition(self) -> tuple[int, ...]:
        """Boundaries of the stages."""
        return self.layout.boundaries

    @property
    def layout(self) -> Layout:
        """Where the weights live. Raises LayerError before `init` or `from_layers`."""
        if self._layout is None:
            raise LayerError(
                "This pipeline has no params yet. Call pipe.init(key, example_inputs) or pipe.from_layers."
            )
        return self._layout

    def _cut(self, params: Sequence[Params], shapes: list[LayerShapes] | None) -> Layout:
        """Cuts the module once; later calls must agree."""
        if self._layout is not None:
            check_layers(self.module, params, self._layout.layer_params)
        else:

            def known() -> list[LayerShapes]:
                if shapes is not None:
                    return shapes
                if self.module.partition_method == "cost":
                    raise LayerError('partition_method="cost" needs the shapes of the data: call pipe.check first.')
                return [LayerShapes(p, None, None) for p in params]

            boundaries = self.module.partition_from(self.num_stages, known)
            self._layout = Layout(self.module, boundaries, params)
        return self._layout

    def to_layers(self, params: Params) -> list[Params]:
        """Per layer, in order, its own params (or gradients) in the shapes its init gave.

        Layers without params, and later uses of a tie, hold nothing: an empty tree.
        """
        check_params(self.layout, params)
        return self.layout.to_layers(params)

    def from_layers(self, layers: Sequence[Params]) -> Params:
        """The inverse of `to_layers`, onto the mesh.

        Raises:
          LayerError: the layers do not fit the module.
        """
        if not isinstance(layers, (list, tuple)):
            raise LayerError(
                f"layers is a {type(layers).__name__}: expected a list with the params of each layer, as to_layers gives."
            )
        if len(layers) != self.module.num_layers:  # before `_cut` reads their shapes
            raise LayerError(
                f"{len(layers)} per-layer params were given; the module has {self.module.num_layers} layers."
            )
        for index, layer in enumerate(layers):
            arrays = [(name, leaf) for name, leaf in paths(layer) if not isinstance(leaf, (bool, int, float, complex))]
            check_types([(f"layers[{index}]{name}", leaf) for name, leaf in arrays], LayerError)
        return self._cut(layers, None).from_layers(self.mesh, layers)

    # ----------------------------------------------------------------------------------------------------- training

    def value_and_grad(
        self, params: Params, batch: Batch, key: jax.Array | int | None = None
    ) -> tuple[jax.Array, Params]:
        """Loss of a batch and its gradient.

        Args:
          params: as `init` gives.
          batch: (inputs, labels), leaves [M, B, ...] with B the rows of a micro-batch on all data ranks.
          key: PRNG key of this step (dropout), or an integer seed; None switches dropout off.

        Returns:
          The mean loss over micro-batches and data ranks, a scalar on all devices, and the gradients in the structure
          and sharding of `params`.

        Raises:
          DataError: the batch does not fit M or the data ranks. LayerError, LossError: the model does not fit itself.
        """
        inputs, labels = self._checked(batch)
        check_params(self.layout, params)
        return self._train(params, inputs, labels, None if key is None else as_key(key))

    def lower_train(self, params: Params, batch: Batch, key: jax.Array | int | None = None) -> jax.stages.Lowered:
        """The training program, lowered; takes arrays or ShapeDtypeStruct. `.compile().memory_analysis()` and so on."""
        inputs, labels = self._checked(batch)
        return self._train.lower(
            self._placed(params),
            avals(inputs),
            avals(labels),
            None if key is None else as_key(key),
        )

    def _placed(self, params: Params) -> Params:
        check_params(self.layout, params)
        return with_places(params, self.layout.shardings(self.mesh))

    def _checked(self, batch: Batch) -> Batch:
        inputs, labels, _ = check_batch(batch, self.num_micro_batches, self.mesh)
        return inputs, labels

    def check(self, example: Batch) -> jax.ShapeDtypeStruct:
        """Runs layers and loss on the shapes of one micro-batch (inputs, labels); raises what would not fit.

        Fixes the partition. Returns the shape and dtype of the loss.
        """
        check_example(example, self.mesh)
        shapes = self.module.shapes(example[0], mesh=self.mesh)
        self._cut([s.params for s in shapes], shapes)
        if self.module.loss_fn is None or example[1] is None:
            return jax.ShapeDtypeStruct((), jnp.float32)
        return self.module.loss_shapes(shapes[-1].outputs, avals(example[1]), self.mesh)[0]

    def optimizer(self, tx: optax.GradientTransformation) -> LayerwiseTransformation:
        """An optax transformation over the params tree of this pipeline, for a hand-written loop.

        It gives what `tx` gives on `{"layer_000": {...}, "layer_001": {...}, ...}`, one entry per layer that owns weights,
        each array in the shape its layer made, for any number of stages. See `jaxpipe.optimizer.transformation`.

        Raises:
          ConfigError: `tx` is no gradient transformation.
        """
        return LayerwiseTransformation.of(tx, lambda: self.layout, self.mesh)

    def plan(self, batch: Batch, key: Key | None = None) -> TrainPlan:
        """What a training step on such a batch will do, from shapes alone; `print` shows it.

        Args:
          batch: (inputs, labels), arrays or ShapeDtypeStruct, leaves [M, B, ...].
          key: as for `value_and_grad`, or its abstract value.
        """
        return TrainPlan(self.layout, self.mesh, self.program, self.remat, batch, key)

    def traceable_step(self, params: Params, inputs: Tree, labels: Tree, key: Key | None) -> StepResult:
        """`value_and_grad` without its checks and its own jit, for use inside a larger compiled step."""
        batch = inputs, labels
        plan = TrainPlan(self.layout, self.mesh, self.program, self.remat, batch, key)
        return _value_and_grad(plan, params, batch, key, poison=self._poison)

    # --------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self,
        params: Params,
        batch: Batch,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        num_micro_batches: int | None = None,
        *,
        bcast_loss: bool = True,
        return_metrics: bool = False,
        spread_loss: bool | None = None,
    ) -> Any:
        """Runs the model forward, in evaluation mode, on a batch of any M, rows and sequence length.

        Args:
          batch: (inputs, labels), leaves [M, B, ...]; labels may be None without `compute_loss`. B need not be a multiple
            of the data ranks (except inside a caller's `jit`).
          return_logits: also return the outputs of every micro-batch.
          compute_loss: without it only outputs are returned, and neither labels nor a `loss_fn` are needed.
          reduce_output: "avg" is the loss of the whole batch, "sum" the sum over micro-batches, None one value each, [M].
            Of a `Weighted` loss: all totals over all weights; the sum of the values; total / weight of each. It is 0 where
            the weight is 0.
          num_micro_batches: if given, M must be this.
          bcast_loss: False leaves loss and metrics on the devices of the last rank; the program then has no broadcast.
          return_metrics: also return the metrics that `loss_fn` gives beside the loss, each joined over the whole batch by
            its own rule (see `jaxpipe.metrics`).
          spread_loss: whether all ranks share the work of the layers behind the last repeated block and of the loss, a
            micro-batch each, instead of the last rank doing all of it. None: where that is faster, judged by FLOPs. It is
            possible with several ranks, no outputs or values per row asked for, and `bcast_loss`.

        Returns:
          `loss`, `(loss, outputs)` or `outputs`, with `return_metrics` a dict behind it. Leaves of outputs are [M, B, ...],
          in order, on the devices of the last rank and sharded over its data ranks (inside a caller's `jit`, on all of
          them).
        """
        options = Options.of(
            return_logits=return_logits,
            compute_loss=compute_loss,
            reduce_output=reduce_output,
            bcast_loss=bcast_loss,
            return_metrics=return_metrics,
            spread_loss=spread_loss,
        )
        batch = self._checked_eval(batch, num_micro_batches, options, any_rows=True)
        check_params(self.layout, params)
        return self.evaluator.run(params, [batch], options).answer(options)

    def lower_eval(self, params: Params, batch: Batch, **options: Any) -> jax.stages.Lowered:
        """The evaluation program, lowered; options as for `evaluate`."""
        known = inspect.signature(self.evaluate).parameters.keys() - {"params", "batch"}
        if unknown := sorted(options.keys() - known):
            raise ConfigError(f"lower_eval got the options {unknown}; it knows {sorted(known)}.")
        num_micro_batches = options.pop("num_micro_batches", None)
        chosen = Options.of(**options)
        batch = self._checked_eval(batch, num_micro_batches, chosen)
        return self.evaluator.lower(self._placed(params), batch, chosen)

    def _checked_eval(
        self, batch: Batch, num_micro_batches: int | None, options: Options, any_rows: bool = False
    ) -> Batch:
        inputs, labels, _ = check_batch(batch, num_micro_batches, self.mesh, options.loss, any_rows)
        return inputs, labels if options.loss else None
