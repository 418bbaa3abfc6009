"""`PipelineModule`: a list of layers, its loss, and how to cut it into stages."""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.errors import DataError, LossError
from jaxpipe.model import keys, partition
from jaxpipe.model.axes import AxisRules
from jaxpipe.model.costs import Costs, Recomputing, recompute
from jaxpipe.model.layers import BoundLayer, bind, entries_of
from jaxpipe.model.loss import LossShapes, loss_shapes
from jaxpipe.model.specs import Layer, LayerSpec
from jaxpipe.model.tracing import LayerShapes, Tracer
from jaxpipe.types import Avals, Key, LossFn, Params, Tree

Traced = TypeVar("Traced")


class PipelineModule:
    """A model as a list of layers.

    Args:
      layers: `Layer`, `LayerSpec`, `TiedLayerSpec` or other callables. Each takes what the one before it returns, any
        pytree with leaves [B, ...], as one positional argument.
      loss_fn: `loss_fn(outputs, labels)` returns a scalar mean, or `jaxpipe.Weighted(total, weight)` for an exactly
        weighted mean. Either may be the first of a pair with a dict of metrics (see `jaxpipe.metrics`), or the entry
        "loss" of a dict with metrics. With None, the output of the last layer is the loss.
      partition_method: "cost" (the FLOPs of a training step, as XLA counts them), "parameters", "uniform", "type:<regex>"
        (balances the layers whose name matches), or explicit boundaries such as `[0, 3, 6, 10]`. None is "cost" where the
        shapes of the data are known when the model is cut, as they are to `initialize` and `Pipeline.init`, and
        "parameters" where they are not, which is in `Pipeline.from_layers` if nothing came before it.
      sharding: which params are cut over further axes of the mesh: pairs of a regular expression and a PartitionSpec, such
        as `[(r"qkv/kernel", P(None, "model"))]`. The expression is searched for in "layer_003/attn/qkv/kernel", the first
        rule that is found counts, and the spec is for the dims that the layer made.
      axis_rules: what the names stand for that flax layers give to the dims of their params (`with_partitioning` and the
        like), such as `{"embed": None, "mlp": "model"}`: a mesh axis, a tuple of axes, or None. They hold for params that
        no rule in `sharding` is for. A name without an entry is that of a mesh axis.

    Raises:
      LayerError: `layers` is no list of layers.
      ShardingError: `sharding` or `axis_rules` are no rules. Whether they fit mesh and params is checked later.
      LossError: `loss_fn` is not callable.
      PartitionError: `partition_method` is neither a string nor integers.

    Attributes:
      layers: the layers as the rest of jaxpipe uses them, in order.
      axes: the further mesh axes that layers may name: those of the rules, and of the meshes that pipelines were made on.
      owners: for each layer, the index of the layer that owns the weights it computes with; its own index unless it is a
        later use of a tied layer.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        loss_fn: LossFn | None = None,
        partition_method: str | Sequence[int] | None = None,
        *,
        sharding: Sequence[tuple[str, PartitionSpec]] | None = None,
        axis_rules: Mapping[str, str | tuple[str, ...] | None] | None = None,
    ):
        self.entries: tuple[Any, ...] = entries_of(layers)
        if loss_fn is not None and not callable(loss_fn):
            raise LossError(
                f"PipelineModule(loss_fn={loss_fn!r}): it is a function loss_fn(outputs, labels), or None if the last "
                "layer returns the loss."
            )
        if partition_method is not None:
            partition.check_method(partition_method)
        self.axis_rules = AxisRules.of(sharding, axis_rules)
        self.axes = self.axis_rules.axes
        self.layers: tuple[BoundLayer, ...] = bind(self.entries)
        self.loss_fn = loss_fn
        self.partition_method = partition_method
        self.costs = Costs(self)
        first_use: dict[Hashable, int] = {}
        for index, layer in enumerate(self.layers):
            if layer.tie is not None:
                first_use.setdefault(layer.tie, index)
        self.owners: tuple[int, ...] = tuple(
            index if layer.tie is None else first_use[layer.tie] for index, layer in enumerate(self.layers)
        )
        self._tracer = Tracer(self.layers, self.owners, self.axis_rules, self.axes)

    @property
    def num_layers(self) -> int:
        """The number of layers, later uses of tied layers included."""
        return len(self.layers)

    def __repr__(self) -> str:
        return f"PipelineModule({', '.join(layer.name for layer in self.layers)})"

    def label(self, index: int) -> str:
        """The name of a layer in messages, such as `layer 2 (Block)`."""
        return self._tracer.label(index)

    def init_layer(self, index: int, key: Key, inputs: Tree) -> Params:
        """Makes the params of one layer; see `Tracer.init_layer`."""
        return self._tracer.init_layer(index, key, inputs)

    def init_state(self, index: int, key: Key, inputs: Tree) -> Tree:
        """Makes the state of one layer; see `Tracer.init_state`."""
        return self._tracer.init_state(index, key, inputs)

    def modules(self, layers: Sequence[Params], states: Sequence[Tree], key: Key) -> list[Any]:
        """What the entries of the layer list are with other params and other state.

        Args:
          layers: per layer its params, as `Engine.to_layers` gives them.
          states: per layer its state, as `Engine.layer_state` gives them.
          key: the key of the model, for the random streams of nnx modules that `LayerSpec`s make.

        Returns:
          For each layer a new flax module, and the same object for all layers that share their weights; linen modules are
          bound to their params and state. For a `Layer` its params, and for a function without params the function.
        """
        found: list[Any] = []
        for index, layer in enumerate(self.layers):
            owner = self.owners[index]
            if owner != index:
                found.append(found[owner])
            elif layer.build is not None:
                found.append(layer.build(layers[index], states[index], keys.init_key(key, index)))
            else:
                entry = self.entries[index]
                found.append(layers[index] if isinstance(entry, (Layer, LayerSpec)) else entry)
        return found

    def shapes(
        self,
        example: Tree,
        params: Sequence[Params] | None = None,
        states: Sequence[Tree] | None = None,
        **settings: Any,
    ) -> list[LayerShapes]:
        """Runs the layers on shapes only; see `Tracer.shapes`."""
        return self._tracer.shapes(example, params, states, **settings)

    def on_mesh(self, mesh: Mesh, trace: Callable[[], tuple[()]]) -> None:
        """Runs `trace` on shapes as inside of a compiled step; see `Tracer.on_mesh`."""
        self._tracer.on_mesh(mesh, trace)

    def alone(self, trace: Callable[[], Traced]) -> Traced:
        """What `trace` gives where layers are traced as on one device; see `Tracer.alone`."""
        return self._tracer.alone(trace)

    def loss_shapes(self, outputs: Avals, labels: Avals, mesh: Mesh | None = None) -> LossShapes:
        """The shapes of the loss terms of one micro-batch; see `jaxpipe.model.loss.loss_shapes`."""
        return loss_shapes(self.loss_fn, outputs, labels, mesh)

    def partition(self, num_stages: int, example: Tree) -> tuple[int, ...]:
        """Cuts the layers into stages.

        Args:
          num_stages: S.
          example: one micro-batch of inputs, arrays or ShapeDtypeStruct [B, ...].

        Returns:
          The boundaries of the stages: S + 1 rising layer indices from 0 to the number of layers.

        Raises:
          PartitionError: the method is unknown or does not fit, or there are more stages than layers.
          DataError: the example holds no array.
        """
        if not jax.tree.leaves(example):
            raise DataError(f"The example {example!r} holds no array: pass one micro-batch of inputs, or its shapes.")
        return self.partition_from(num_stages, lambda: self.shapes(example))

    def partition_from(
        self,
        num_stages: int,
        shapes: Callable[[], list[LayerShapes]],
        recomputing: Recomputing = recompute,
        default: str = "cost",
        frozen: Callable[[int], Collection[int]] = lambda layer: (),
    ) -> tuple[int, ...]:
        """The same as `partition`, except that `shapes` is called only if the method needs the shapes.

        Args:
          recomputing: what the rematerialisation mode does to the function of a layer; that of "layer" by default.
          default: the method where the user has named none.
          frozen: for each layer the numbers of the leaves of its params that are frozen, which cost less.
        """

        def weights(method: str) -> list[int]:
            if method == "parameters":
                return [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(s.params)) for s in shapes()]
            return self.costs.training(shapes(), recomputing, frozen)

        return partition.partition(
            default if self.partition_method is None else self.partition_method,
            num_layers=self.num_layers,
            num_stages=num_stages,
            names=[layer.name for layer in self.layers],
            weights=weights,
        )
