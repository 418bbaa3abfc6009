"""`PipelineModule`: the layer list, its loss, and how to cut it."""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
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
from jaxpipe.types import Avals, LossFn, Params, Tree


@dataclass(frozen=True)
class LayerShapes:
    """Abstract values of one layer.

    Attributes:
      params: what it holds; nothing for a later use of a tie.
      inputs, outputs: what it takes and returns.
      run: `run(params, x, key) -> y`, the layer as it was traced (key: None if it looks at none). None if shapes were
        evaluated without a mesh.
    """

    params: Avals
    inputs: Avals
    outputs: Avals
    run: Captured | None = None


class PipelineModule:
    """A model as a list of layers.

    Args:
      layers: `Layer`, `LayerSpec`, `TiedLayerSpec` or other callables; each takes what the one before it returns, as one
        positional argument (any pytree).
      loss_fn: `loss_fn(outputs, labels)` returns a scalar mean, or `jaxpipe.Weighted(total, weight)` for an exactly
        weighted mean; either may be the first of a pair with a dict of metrics (see `jaxpipe.metrics`), or the entry
        "loss" of a dict with them. None: the last layer's output is the loss.
      partition_method: "uniform", "parameters", "cost" (FLOPs as XLA counts them), "type:<regex>" (balances the layers
        whose name matches), or explicit boundaries such as `[0, 3, 6, 10]`.

    Raises:
      LayerError: `layers` is no list of layers. LossError: `loss_fn` is not callable. PartitionError: `partition_method`
        is neither a string nor integers.
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
        self._counted_flops: dict[tuple[Any, ...], int] = {}
        first_use: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            if layer.tie is not None:
                first_use.setdefault(layer.tie, index)
        # owners[i]: index of the layer that holds the weights layer i computes with; i itself unless tied.
        self.owners: tuple[int, ...] = tuple(
            index if layer.tie is None else first_use[layer.tie] for index, layer in enumerate(self.layers)
        )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"PipelineModule({', '.join(layer.name for layer in self.layers)})"

    def label(self, index: int) -> str:
        """How messages name a layer."""
        return f"layer {index} ({self.layers[index].name})"

    def init_layer(self, index: int, key: jax.Array, inputs: Tree) -> Params:
        """Params of one layer from the model's key; `inputs` are arrays of the shapes the layer takes."""
        if self.owners[index] != index:
            return {}  # a later use of a tie holds nothing of its own
        return self.layers[index].init(keys.init_key(key, index), inputs)

    def shapes(
        self,
        example: Tree,
        params: Sequence[Params] | None = None,
        *,
        train: bool = True,
        key: Any = keys.KEY,
        mesh: Mesh | None = None,
    ) -> list[LayerShapes]:
        """Runs the list on shapes only.

        Args:
          example: one micro-batch of inputs (arrays or ShapeDtypeStruct).
          params: per-layer params, if known; otherwise their shapes come from each layer's `init`.
          train, key: what each `apply` is called with (`key`: an abstract key, or None).
          mesh: whose axes layers may name; None: "data" is an axis of one device.

        Raises:
          LayerError: a layer does not accept what the layer before it returns; both are named. What a layer itself raises
            is raised as it is, with a note that names the layer.
        """
        found: list[LayerShapes] = []
        if mesh is None:
            self._shapes(found, example, params, train, key)
        else:
            with_axes(mesh, functools.partial(self._trace, found, example, params, train, key, mesh))()
        return found

    def _trace(
        self,
        found: list[LayerShapes],
        example: Tree,
        params: Sequence[Params] | None,
        train: bool,
        key: Avals,
        mesh: Mesh,
    ) -> tuple[()]:
        """Fills `found`, with the mesh axes bound. Layers of one kind on the same shapes are traced once."""
        seen: dict[Hashable, Captured] = {}
        x = avals(example)
        for index, layer in enumerate(self.layers):
            with self._blame(index, x):
                held = avals(params[index]) if params is not None else None
                if held is None:
                    made = capture(lambda v, i=index: self.init_layer(i, jax.random.key(0), v), x)
                    refuse_deadlocks(made.jaxpr, mesh)
                    held = made.outputs
                owned = held if self.owners[index] == index else found[self.owners[index]].params
                args = owned, x, key if layer.kind.uses_key else None
                same = layer.kind, signature(args)
                if same not in seen:
                    apply = functools.partial(layer.kind.apply, train=train)
                    seen[same] = Captured(*jax.make_jaxpr(apply, return_shape=True)(*args))
                    refuse_deadlocks(seen[same].jaxpr, mesh)
            found.append(LayerShapes(held, x, seen[same].outputs, seen[same]))
            x = seen[same].outputs
        return ()

    def _shapes(
        self, found: list[LayerShapes], example: Tree, params: Sequence[Params] | None, train: bool, key: Avals
    ) -> None:
        """Fills `found` without a mesh."""
        x = avals(example)
        for index, layer in enumerate(self.layers):
            with self._blame(index, x):
                held = avals(params[index]) if params is not None else None
                if held is None:
                    held = on_one_data_rank(lambda v, i=index: self.init_layer(i, jax.random.key(0), v), x)
                owned = held if self.owners[index] == index else found[self.owners[index]].params
                y = on_one_data_rank(functools.partial(layer.kind.apply, train=train), owned, x, key)
            found.append(LayerShapes(held, x, y))
            x = y

    def _blame(self, index: int, x: Avals) -> AbstractContextManager[None]:
        source = f"{self.label(index - 1)} returns" if index else "the example inputs are"
        return blame(self.label(index), lambda: f"{source} {describe(x)}")

    def loss_shapes(self, outputs: Tree, labels: Tree, mesh: Mesh | None = None) -> LossShapes:
        """Shapes of the loss terms of one micro-batch, from those of outputs and labels.

        `mesh` has the axes that `loss_fn` may name.

        Raises:
          LossError: `loss_fn` returns something else. DataError: it needs labels, and there are none.
        """
        return loss_shapes(self.loss_fn, outputs, labels, mesh)

    def partition(self, num_stages: int, example: Tree) -> tuple[int, ...]:
        """Boundaries of the stages, `num_stages + 1` ascending layer indices from 0 to the number of layers.

        Args:
          num_stages: how many stages.
          example: one micro-batch of inputs (arrays or ShapeDtypeStruct).

        Raises:
          PartitionError: the method is unknown, does not fit, or there are more stages than layers. DataError: the example
            holds no array.
        """
        if not jax.tree.leaves(example):
            raise DataError(f"The example {example!r} holds no array: pass one micro-batch of inputs, or its shapes.")
        return self.partition_from(num_stages, lambda: self.shapes(example))

    def partition_from(self, num_stages: int, shapes: Callable[[], list[LayerShapes]]) -> tuple[int, ...]:
        """As `partition`, with the shapes made only if the method needs them."""

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
        """Floating-point operations of each layer's forward, as XLA counts them before it optimizes."""
        counted = self._counted_flops
        flops = []
        for index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True)):
            held = shapes[self.owners[index]].params
            seen = (layer.kind, str(avals((held, shape.inputs))))
            if seen not in counted:
                with self._blame(index, shape.inputs):
                    run = with_data_axis(lambda p, x, f=layer.apply: f(p, x, None, True), 1)
                    lowered = jax.jit(run).lower(held, shape.inputs)
                counted[seen] = int((lowered.cost_analysis() or {}).get("flops", 0))
            flops.append(counted[seen])
        return flops


def _entries(layers: Any) -> tuple[Any, ...]:
    """The entries of a layer list; LayerError for what is none, or has no order, or is a single layer."""
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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else "no message"
