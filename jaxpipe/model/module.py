"""`PipelineModule`: a list of layers, its loss, and how to cut it into stages."""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.errors import DataError, LayerError, LossError
from jaxpipe.model import keys, partition
from jaxpipe.model.abstract import on_one_data_rank, refuse_deadlocks, with_axes, with_data_axis
from jaxpipe.model.blame import blame
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.layers import BoundLayer, Layer, LayerSpec, bind
from jaxpipe.model.loss import LossShapes, loss_shapes
from jaxpipe.model.shapes import avals, describe, signature
from jaxpipe.types import Avals, Key, LossFn, Params, Tree


@dataclass(frozen=True)
class LayerShapes:
    """The shapes of one layer, trees of ShapeDtypeStruct, and its trace.

    Attributes:
      params: the params that it owns; `{}` for a later use of a tied layer.
      inputs: what it takes, leaves [B, ...].
      outputs: what it returns, leaves [B, ...].
      run: `run(params, x, key) -> y`, the layer as it was traced. The key is None if the layer looks at none. Without a
        mesh there is no trace, and this is None.
    """

    params: Avals
    inputs: Avals
    outputs: Avals
    run: Captured | None = None


class PipelineModule:
    """A model as a list of layers.

    Args:
      layers: `Layer`, `LayerSpec`, `TiedLayerSpec` or other callables. Each takes what the one before it returns, any
        pytree with leaves [B, ...], as one positional argument.
      loss_fn: `loss_fn(outputs, labels)` returns a scalar mean, or `jaxpipe.Weighted(total, weight)` for an exactly
        weighted mean. Either may be the first of a pair with a dict of metrics (see `jaxpipe.metrics`), or the entry
        "loss" of a dict with metrics. With None, the output of the last layer is the loss.
      partition_method: "uniform", "parameters", "cost" (FLOPs as XLA counts them), "type:<regex>" (balances the layers
        whose name matches), or explicit boundaries such as `[0, 3, 6, 10]`.

    Raises:
      LayerError: `layers` is no list of layers.
      LossError: `loss_fn` is not callable.
      PartitionError: `partition_method` is neither a string nor integers.

    Attributes:
      layers: the layers as the rest of jaxpipe uses them, in order.
      owners: for each layer, the index of the layer that owns the weights it computes with; its own index unless it is a
        later use of a tied layer.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        loss_fn: LossFn | None = None,
        partition_method: str | Sequence[int] = "parameters",
    ):
        self.entries: tuple[Any, ...] = _entries(layers)
        if loss_fn is not None and not callable(loss_fn):
            raise LossError(
                f"PipelineModule(loss_fn={loss_fn!r}): it is a function loss_fn(outputs, labels), or None if the last "
                "layer returns the loss."
            )
        partition.check_method(partition_method)
        self.layers: tuple[BoundLayer, ...] = bind(self.entries)
        self.loss_fn = loss_fn
        self.partition_method = partition_method
        self._counted_flops: dict[Hashable, int] = {}
        first_use: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            if layer.tie is not None:
                first_use.setdefault(layer.tie, index)
        self.owners: tuple[int, ...] = tuple(
            index if layer.tie is None else first_use[layer.tie] for index, layer in enumerate(self.layers)
        )

    @property
    def num_layers(self) -> int:
        """The number of layers, later uses of tied layers included."""
        return len(self.layers)

    def __repr__(self) -> str:
        return f"PipelineModule({', '.join(layer.name for layer in self.layers)})"

    def label(self, index: int) -> str:
        """The name of a layer in messages, such as `layer 2 (Block)`."""
        return f"layer {index} ({self.layers[index].name})"

    def init_layer(self, index: int, key: Key, inputs: Tree) -> Params:
        """Makes the params of one layer.

        Args:
          key: the key of the model; each layer uses its own key, which is made of it.
          inputs: arrays of the shapes that the layer takes.

        Returns:
          The params; `{}` for a later use of a tied layer.
        """
        if self.owners[index] != index:
            return {}
        return self.layers[index].init(keys.init_key(key, index), inputs)

    def shapes(
        self,
        example: Tree,
        params: Sequence[Params] | None = None,
        *,
        train: bool = True,
        key: jax.ShapeDtypeStruct | None = keys.KEY,
        mesh: Mesh | None = None,
    ) -> list[LayerShapes]:
        """Runs the layers on shapes only.

        Args:
          example: one micro-batch of inputs, arrays or ShapeDtypeStruct [B, ...].
          params: the params of each layer, arrays or ShapeDtypeStruct. Without them, the `init` of each layer decides.
          train, key: what each layer is called with; `key` is the shape of a key, or None.
          mesh: the mesh whose axes layers may name. With None, "data" is an axis of one device.

        Returns:
          The shapes of each layer, in order.

        Raises:
          LayerError: a layer does not accept what the layer before it returns. The message names both. What a layer itself
            raises is raised as it is, with a note that names the layer.
        """
        found: list[LayerShapes] = []
        trace = functools.partial(self._trace, found, example, params, train, key, mesh)
        trace() if mesh is None else with_axes(mesh, trace)()
        return found

    def _trace(
        self,
        found: list[LayerShapes],
        example: Tree,
        params: Sequence[Params] | None,
        train: bool,
        key: Avals,
        mesh: Mesh | None,
    ) -> tuple[()]:
        """Fills `found`; if there is a mesh, its axes are bound. Layers of one kind on the same shapes are traced once."""
        seen: dict[Hashable, tuple[Avals, Captured | None]] = {}
        x = avals(example)
        for index, layer in enumerate(self.layers):
            source = f"{self.label(index - 1)} returns" if index else "the example inputs are"
            with blame(self.label(index), lambda x=x, source=source: f"{source} {describe(x)}"):
                held = self._init_shapes(index, x, mesh) if params is None else avals(params[index])
                owned = held if self.owners[index] == index else found[self.owners[index]].params
                args = owned, x, key if layer.kind.uses_key else None
                same = layer.kind, signature(args)
                apply = functools.partial(layer.kind.apply, train=train)
                if same in seen:
                    pass
                elif mesh is None:
                    seen[same] = on_one_data_rank(apply, *args), None
                else:
                    run = Captured(*jax.make_jaxpr(apply, return_shape=True)(*args))
                    refuse_deadlocks(run.jaxpr, mesh)
                    seen[same] = run.outputs, run
            y, run = seen[same]
            found.append(LayerShapes(held, x, y, run))
            x = y
        return ()

    def _init_shapes(self, index: int, x: Avals, mesh: Mesh | None) -> Avals:
        def init(x: Tree) -> Params:
            return self.init_layer(index, jax.random.key(0), x)

        if mesh is None:
            return on_one_data_rank(init, x)
        made = capture(init, x)
        refuse_deadlocks(made.jaxpr, mesh)
        return made.outputs

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

    def partition_from(self, num_stages: int, shapes: Callable[[], list[LayerShapes]]) -> tuple[int, ...]:
        """The same as `partition`, except that `shapes` is called only if the method needs the shapes."""

        def weights(method: str) -> list[int]:
            if method == "parameters":
                return [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(s.params)) for s in shapes()]
            return self.flops(shapes())

        return partition.partition(
            self.partition_method,
            num_layers=self.num_layers,
            num_stages=num_stages,
            names=[layer.name for layer in self.layers],
            weights=weights,
        )

    def flops(self, shapes: list[LayerShapes]) -> list[int]:
        """The floating-point operations of the forward of each layer, as XLA counts them before it optimizes."""
        counted = self._counted_flops
        flops = []
        for index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True)):
            held = shapes[self.owners[index]].params
            seen = (layer.kind, str(avals((held, shape.inputs))))
            if seen not in counted:
                source = f"{self.label(index - 1)} returns" if index else "the example inputs are"
                with blame(self.label(index), lambda x=shape.inputs, source=source: f"{source} {describe(x)}"):
                    run = with_data_axis(lambda p, x, f=layer.apply: f(p, x, None, True), 1)
                    lowered = jax.jit(run).lower(held, shape.inputs)
                counted[seen] = int((lowered.cost_analysis() or {}).get("flops", 0))
            flops.append(counted[seen])
        return flops


def _entries(layers: Any) -> tuple[Any, ...]:
    """The entries of a list of layers; raises LayerError for anything else, such as a set, a dict or a single layer."""
    if (
        isinstance(layers, (Layer, LayerSpec, str, bytes, Mapping, Set))
        or callable(layers)
        or not isinstance(layers, Iterable)
    ):
        shown = " ".join(repr(layers).split())
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise LayerError(
            f"PipelineModule({shown}): the first argument is a {type(layers).__name__}, but it is the list of layers, in "
            "order, such as [jaxpipe.LayerSpec(Embed, 64), jaxpipe.LayerSpec(Block, 64), jax.nn.relu]."
        )
    return tuple(layers)
