"""`Pipeline`: the functional core. Pure functions of params and a batch, ready for a hand-written training loop."""

import inspect
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpipe.checks import count, show
from jaxpipe.data.check import check_batch, check_example, check_layer_params
from jaxpipe.data.leaves import check_rows, check_types, named
from jaxpipe.data.place import on_all
from jaxpipe.data.shapes_seen import ShapesSeen
from jaxpipe.errors import ConfigError, LayerError
from jaxpipe.evaluation.evaluator import Evaluator, with_places
from jaxpipe.evaluation.generator import Generator
from jaxpipe.evaluation.prompts import Prompts
from jaxpipe.executor.options import Options
from jaxpipe.executor.order import check_order
from jaxpipe.executor.permutes import Checked
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.executor.remat import RematOption, check_remat, recomputing
from jaxpipe.executor.train import StepResult
from jaxpipe.executor.train import value_and_grad as _value_and_grad
from jaxpipe.layout.checks import check_layers, check_params
from jaxpipe.layout.frozen import Frozen
from jaxpipe.layout.init import init_params
from jaxpipe.layout.layer_states import LayerStates
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.on_mesh import layout_on
from jaxpipe.layout.stages import make_stages
from jaxpipe.layout.zero import check_zero_stage
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import Program
from jaxpipe.mesh import further_axes, pipe_size
from jaxpipe.model.keys import anywhere, as_key
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.precision import Precision
from jaxpipe.model.reports import check_names, named_aux, training_metrics
from jaxpipe.model.shapes import avals
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.model.trainable import Trainable, TrainableOption
from jaxpipe.optimizer.transformation import LayerwiseTransformation
from jaxpipe.processes.group import Group
from jaxpipe.schedules import Schedule
from jaxpipe.schedules.on_ranks import get_on_ranks
from jaxpipe.training.loss_scale import LossScale, as_loss_scale, first_scale
from jaxpipe.types import Batch, Key, Params, Tree


class Pipeline:
    """A module put on a mesh under a schedule.

    Args:
      module: the layers and their loss.
      mesh: with the axis "pipe", and usually "data"; see `make_mesh`.
      num_micro_batches: M of a training batch.
      schedule: "1f1b", "eager_1f1b", "gpipe", a `Schedule`, or the path of a CSV.
      remat: what the backward pass recomputes. "layer" saves the input of each layer, "stage" that of the stage, an
        interval k that of every k-th layer; "none" saves all that is needed; "dots" the input and the products of
        activations and weights (those without batch dims), and recomputes the rest; or a `jax.checkpoint` policy, per
        layer.
      compute_dtype: what a step and an evaluation compute in; see `Config`. Params, gradients, outputs are float32.
      float32_params: as in `Config`.
      loss_scale: as in `Config`. A dynamic one keeps its `initial` scale here, because nothing is remembered between calls.
      trainable: which params are trained, a regular expression or a function of a path; see `jaxpipe.initialize`. Gradients
        have None in the place of the others.
      zero_stage: 1 cuts params, gradients and the state of `optimizer` over the data ranks, too: each stores a part, and
        a step gathers them once. Where no dim divides, one is padded with zeros, which `to_layers` cuts off. 0 does not.
      num_chunks: the number of stages of a rank, for schedules that deal out several; see `Config`.
    """

    def __init__(
        self,
        module: PipelineModule,
        mesh: Mesh,
        num_micro_batches: int = 1,
        schedule: str | Schedule | os.PathLike[str] = "1f1b",
        remat: RematOption = "layer",
        *,
        compute_dtype: Any = None,
        float32_params: str | None = None,
        loss_scale: LossScale = None,
        zero_stage: int = 0,
        trainable: TrainableOption = None,
        num_chunks: int = 1,
        poison: bool = False,
    ):
        if not isinstance(module, PipelineModule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise LayerError(
                f"module={show(module)}: expected a jaxpipe.PipelineModule. Write jaxpipe.PipelineModule(layers, loss_fn)."
            )
        self.module, self.mesh, num_ranks = module, mesh, pipe_size(mesh)
        module.axes.update(further_axes(mesh))
        self.num_micro_batches = count("num_micro_batches", num_micro_batches)
        self.remat, self.zero_stage = check_remat(remat), check_zero_stage(zero_stage)
        self.schedule = get_on_ranks(schedule, num_ranks, self.num_micro_batches, num_chunks)
        self.num_stages = self.schedule.num_stages
        self.program: Program = lower(self.schedule)
        self.precision, self.loss_scale = Precision.of(compute_dtype, float32_params), as_loss_scale(loss_scale)
        self.trainable = Trainable.of(trainable)
        self._poison = poison
        self._layout: Layout | None = None
        self.example: Batch | None = None  # the shapes of one micro-batch, if `check` has seen one
        self._train = Checked(jax.jit(self._loss_grads_and_state), mesh)
        self.shapes_seen = ShapesSeen("training")
        self.evaluator = Evaluator(lambda: self.layout, mesh, self.schedule.placement)
        self.states = LayerStates(mesh, lambda: self.layout)
        self.generator = Generator(lambda: self.layout, mesh, self.evaluator, poison)

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
        root = anywhere(as_key(key), self.mesh)
        shapes = self._shapes(example_inputs)
        return init_params(self._cut([s.params for s in shapes], shapes), self.mesh, root, shapes)

    def _shapes(self, example_inputs: Tree) -> list[LayerShapes]:
        check_types(leaves := named(example_inputs))
        check_rows(leaves, 0, 1, "The example: ")
        return self.module.shapes(example_inputs, mesh=self.mesh, precision=self.precision)

    def init_state(self, key: jax.Array | int, example_inputs: Tree) -> Tree:
        """Makes the state of the layers, such as running means, on the mesh; with the arguments of `init`.

        Returns:
          A tree like that of the params; `to_layers` gives the per-layer view of it, too. It has no leaves where no layer
          has state.
        """
        root, shapes = anywhere(as_key(key), self.mesh), self._shapes(example_inputs)
        self._cut([s.params for s in shapes], shapes)
        return self.states.init(root, shapes)

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

            default = "parameters" if shapes is None else "cost"
            frozen = Frozen.of_model(self.module, params, self.trainable).of
            boundaries = self.module.partition_from(self.num_stages, known, recomputing(self.remat), default, frozen)
            settings = self.zero_stage, self.precision, self.trainable, self.schedule.placement
            self._layout = layout_on(self.mesh, self.module, boundaries, params, *settings)
        if shapes is not None:
            self.states.learn(shapes)
            if not self.states.layout.is_empty:
                check_order(self.program, make_stages(self._layout, shapes))
        return self._layout

    def to_layers(self, params: Params) -> list[Params]:
        """Per layer, in order, its own params (or gradients, or state) in the shapes its init gave.

        Layers without params, and later uses of a tie, hold nothing: an empty tree. A layer that is one of several of its
        kind is copied onto the devices of the rank that holds it. Any other one is given as it is stored: not copied, and
        cut over the ranks where a dim divides. `jaxpipe.fetch` brings all of it to the host of every process.
        """
        states = self.layout.states
        if states is not None and jax.tree.structure(params) == jax.tree.structure(states.shapes()):
            return states.to_layers(params)
        check_params(self.layout, params, or_gradients=True)
        return self.layout.to_layers(params)

    def from_layers(self, layers: Sequence[Params]) -> Params:
        """The inverse of `to_layers`, onto the mesh. It goes array by array, and each rank gets its own.

        Args:
          layers: per layer, its own params: NumPy arrays, arrays of JAX, or what `to_layers` of any pipeline gives.
            With several processes all of them call this and pass the same.

        Raises:
          LayerError: the layers do not fit the module.
        """

        def checked() -> tuple[Layout, list[Params]]:
            plain = check_layer_params(layers, self.module.num_layers)
            return self._cut(plain, None), plain

        layout, plain = Group.of(self.mesh).together(checked)
        return layout.from_layers(self.mesh, plain)

    # ----------------------------------------------------------------------------------------------------- training

    def value_and_grad(
        self, params: Params, batch: Batch, key: jax.Array | int | None = None, layer_state: Tree = None
    ) -> Any:
        """Loss of a batch and its gradient.

        Args:
          params: as `init` gives.
          batch: (inputs, labels), leaves [M, B, ...] with B the rows of a micro-batch on all data ranks.
          key: PRNG key of this step (dropout), or an integer seed; None switches dropout off.
          layer_state: where layers have state, that before the step: what `init_state` or the step before gave, or a list
            with the state of each layer.

        Returns:
          The mean loss over micro-batches and data ranks, with those of extra losses (see `LayerOut`), a scalar on all
          devices, and the gradients in the structure and sharding of `params`, None for what is frozen. Neither is scaled,
          whatever the loss scale is; where gradients overflow under it, they are not finite. With `layer_state`, a third
          entry: the state after the step, in the form in which it was given.

        Raises:
          DataError: the batch does not fit M or the data ranks. LayerError, LossError: the model does not fit itself.
        """
        inputs, labels = self._checked(batch)
        check_params(self.layout, params)
        self.states.see(inputs)
        states = self.states.brought(layer_state)
        root = None if key is None else anywhere(as_key(key), self.mesh)
        inputs, labels = on_all((inputs, labels), self.mesh)
        self.shapes_seen.add((inputs, labels))
        loss, grads, after = self._train(params, inputs, labels, root, None, states)
        if layer_state is None:
            return loss, grads
        return loss, grads, self.to_layers(after) if isinstance(layer_state, (list, tuple)) else after

    def lower_train(self, params: Params, batch: Batch, key: jax.Array | int | None = None) -> jax.stages.Lowered:
        """The training program, lowered; takes arrays or ShapeDtypeStruct. `.compile().memory_analysis()` and so on."""
        inputs, labels = self._checked(batch)
        self.states.see(inputs)
        return self._train.lower(
            self._placed(params),
            avals(inputs),
            avals(labels),
            None if key is None else as_key(key),
            None,
            self.states.avals(),
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
        shapes = self.module.shapes(example[0], mesh=self.mesh, precision=self.precision)
        self._cut([s.params for s in shapes], shapes)
        self.example = avals(example[0]), avals(example[1])
        if self.module.loss_fn is None or example[1] is None:
            check_names(named_aux(self.module.label, shapes), ())
            return jax.ShapeDtypeStruct((), jnp.float32)
        outputs, labels = self.precision.outputs(shapes[-1].outputs), avals(example[1])
        found = self.module.loss_shapes(outputs, labels, self.mesh)
        of_loss_fn = training_metrics(self.module.loss_fn, outputs, labels, self.mesh)
        check_names(named_aux(self.module.label, shapes), of_loss_fn)
        return found.total

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

    def traceable_step(
        self,
        params: Params,
        inputs: Tree,
        labels: Tree,
        key: Key | None,
        scale: Any = None,
        layer_state: Tree = None,
        metrics: bool = True,
    ) -> StepResult:
        """`value_and_grad` without its checks and its own jit, for use inside a larger compiled step.

        Args:
          scale: that of the loss, float32 []; None: the one that this pipeline begins with.
          layer_state: a tree as `init_state` makes it; None: no layer has state.
          metrics: whether the result has metrics.
        """
        batch, first = (inputs, labels), first_scale(self.loss_scale)
        scale = jnp.float32(first) if scale is None and first is not None else scale
        plan = TrainPlan(self.layout, self.mesh, self.program, self.remat, batch, key)
        wanted = {"layer_state": layer_state, "scale": scale, "metrics": metrics}
        return _value_and_grad(plan, params, batch, key, poison=self._poison, **wanted)

    def _loss_grads_and_state(self, *args: Tree) -> tuple[jax.Array, Params, Tree]:
        result = self.traceable_step(*args, metrics=False)
        return result.loss, result.grads, result.layer_state

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
        layer_state: Tree = None,
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
          return_metrics: also return the metrics that `loss_fn` and the layers give, each joined over the whole batch by
            its own rule (see `jaxpipe.metrics`). Without `compute_loss` they are those of the layers.
          spread_loss: whether all ranks share the work of the layers behind the last repeated block and of the loss, a
            micro-batch each, instead of the last rank doing all of it. None: where that is faster, judged by FLOPs. It is
            possible with several ranks, no outputs or values per row asked for, and `bcast_loss`.
          layer_state: as for `value_and_grad`; it is not changed.

        Returns:
          `loss`, `(loss, outputs)` or `outputs`, with `return_metrics` a dict behind it. Leaves of outputs are [M, B, ...],
          in order, on the devices of the last rank and sharded over its data ranks (inside a caller's `jit`, on all of
          them), from where `jaxpipe.fetch` brings them to every process. Without `bcast_loss` loss and metrics are None
          where a process holds no device of the last rank.
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
        self.states.see(batch[0])
        return self.evaluator.run(params, [batch], options, self.states.brought(layer_state)).answer(options)

    def lower_eval(self, params: Params, batch: Batch, **options: Any) -> jax.stages.Lowered:
        """The evaluation program, lowered; options as for `evaluate`."""
        known = inspect.signature(self.evaluate).parameters.keys() - {"params", "batch", "layer_state"}
        if unknown := sorted(options.keys() - known):
            raise ConfigError(f"lower_eval got the options {unknown}; it knows {sorted(known)}.")
        num_micro_batches = options.pop("num_micro_batches", None)
        chosen = Options.of(**options)
        batch = self._checked_eval(batch, num_micro_batches, chosen)
        self.states.see(batch[0])
        return self.evaluator.trace(self._placed(params), batch, chosen, self.states.avals()).lower()

    def _checked_eval(
        self, batch: Batch, num_micro_batches: int | None, options: Options, any_rows: bool = False
    ) -> Batch:
        inputs, labels, _ = check_batch(batch, num_micro_batches, self.mesh, options.loss, any_rows)
        return inputs, labels if options.loss else None

    # --------------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        params: Params,
        prompts: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop: int | None = None,
        key: jax.Array | int | None = None,
        *,
        layer_state: Tree = None,
    ) -> Any:
        """Continues prompts, token after token, with caches on the ranks of their layers; see docs/howto/generation.md.

        Each token is that of one device, whatever the number of ranks and data ranks. A model with a layer that mixes
        positions and has no cache is run over the whole window for each token, and a warning says so once.

        Args:
          prompts: ids of tokens, integers [N, T] or N sequences of unlike lengths; in all processes the same.
          max_new_tokens: how many tokens are added to each row.
          temperature: 0 takes the most likely token each time; otherwise the logits are divided by it, and one is drawn.
          top_k: draw among so many of the most likely tokens; None: among all.
          stop: a row that has this token among the new ones is filled with it from there on; None: there is none.
          key: PRNG key, or an integer seed, of what is drawn; None is 0. A token depends on it, on the number of the row
            and on the number of the token.
          layer_state: as for `value_and_grad`; it is not changed.

        Returns:
          int32 [N, T + max_new_tokens], prompts included, whole on every device and in every process; a list of the rows
          if the lengths of the prompts differ.

        Raises:
          DataError: the prompts are no ids of tokens. ConfigError: another argument is out of range. LayerError: the
            last layer returns no logits [B, T, V], or a layer cannot take sequences of this length, or is not causal.
        """
        check_params(self.layout, params)
        given = Prompts.of(prompts)
        self.states.see(given.parts[0].ids[None])
        states = self.states.brought(layer_state)
        return self.generator.run(params, given, max_new_tokens, temperature, top_k, stop, key, states)
