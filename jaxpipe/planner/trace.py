"""The layers of a model as traced functions: forward and backward of each, by rematerialisation mode, as a step runs them.

Like layers are traced once. Each is traced for two numbers of rows, because costs and sizes are a part that does not depend
on the rows (reading the weights) and a part that grows with them.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh

from jaxpipe.errors import DataError
from jaxpipe.executor import flow
from jaxpipe.executor.remat import mode
from jaxpipe.executor.seeds import Seeds, aval_of
from jaxpipe.executor.tail import Tail
from jaxpipe.executor.unit_halves import UnitHalves
from jaxpipe.layout.stages import Part
from jaxpipe.model.context import Context
from jaxpipe.model.dependence import behind_weights
from jaxpipe.model.keys import KEY
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.precision import Precision
from jaxpipe.model.shapes import avals, signature
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.planner import tables
from jaxpipe.types import Avals, Batch

# What a layer keeps, as `Config.remat` names it. "stage" keeps less, and computes what "layer" does.
KEEPS = ("none", "dots", "layer")


class Traced(NamedTuple):
    """A layer, for some number of rows, under some mode.

    Attributes:
      forward: takes the leaves of the params, and others; gives `num_outputs` values, and then what is kept.
      backward: takes the leaves of the params, what `forward` kept, and others; gives the gradients of `num_gradients`
        params, and then those of the input.
      saved: abstract values of what is kept; of them, the first `num_inputs` are inputs of the layer.
      pending: bytes of what waits between I and W, where the backward is cut.
    """

    forward: ClosedJaxpr
    backward: ClosedJaxpr
    num_outputs: int
    num_gradients: int
    saved: tuple[jax.ShapeDtypeStruct, ...]
    num_inputs: int
    pending: int = 0


class Both(NamedTuple):
    """A layer, or the loss, for two numbers of rows; `large` is for twice those of `small`."""

    small: Traced
    large: Traced


class Model:
    """A model on shapes.

    Args:
      module: the layers.
      example: (inputs, labels) of some rows, arrays or ShapeDtypeStruct.
      mesh: of one device, with the axes that layers may name.
      precision: what a step computes in.

    Attributes:
      rows: those of the example.
      shapes: what the layers take and return, for the rows of the example.
      likes: of each layer, the number of the first one that is like it.
      layers: by that number and by mode, the traces.
      loss: that of the loss and its gradient.
      batch_bytes: of a row of inputs and labels.

    Raises:
      DataError: there are no inputs, or no labels where the loss needs them. LayerError, LossError: the model does not fit
        itself.
    """

    def __init__(self, module: PipelineModule, example: Batch, mesh: Mesh, precision: Precision):
        self.module, self.mesh, self.precision = module, mesh, precision
        leaves = jax.tree.leaves(example)
        if not leaves or not jax.tree.leaves(example[0]):
            raise DataError(f"example={example!r} holds no inputs: pass (inputs, labels), or their shapes.")
        if module.loss_fn is not None and example[1] is None:
            raise DataError(
                "The example has no labels: pass (inputs, labels) of some rows, because the loss is planned, too."
            )
        self._cut_in_two = any(map(tables.is_split, tables.schedules()))
        self.rows = int(jax.tree.leaves(example[0])[0].shape[0])
        small, large = _with_rows(example, self.rows), _with_rows(example, 2 * self.rows)
        self.batch_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(small)) / self.rows
        settings = {"mesh": mesh, "precision": precision}
        self.shapes = module.shapes(small[0], **settings)
        held, states = [shape.params for shape in self.shapes], [shape.state for shape in self.shapes]
        found = [self.shapes, module.shapes(large[0], held, states, **settings)]
        self.flags = behind_weights(self.shapes, module.owners)
        keys = [self._key(index) for index in range(module.num_layers)]
        self.likes = [keys.index(key) for key in keys]
        self.layers: dict[tuple[int, str], Both] = {}
        made: list[list[Traced]] = []
        self.on_mesh = functools.partial(module.on_mesh, mesh)
        self.on_mesh(functools.partial(self._trace, found, (small, large), made))
        firsts = sorted(set(self.likes))
        names = [(index, keeps) for index in firsts for keeps in KEEPS]
        for name, traced in zip(names, made, strict=False):
            self.layers[name] = Both(*traced)
        self.loss = Both(*made[-1])

    def _key(self, index: int) -> Hashable:
        shape, owner = self.shapes[index], self.module.owners[index]
        held = self.shapes[owner].computed
        flags = self.flags[index], self.flags[index + 1]
        return self.module.layers[index].kind, signature((held, shape.inputs, self.shapes[owner].state)), flags

    def _trace(
        self, found: Sequence[list[LayerShapes]], batches: Sequence[Batch], made: list[list[Traced]]
    ) -> tuple[()]:
        for index in sorted(set(self.likes)):
            made += [[self._layer(index, shapes, keeps) for shapes in found] for keeps in KEEPS]
        made.append([self._loss(shapes, batch) for shapes, batch in zip(found, batches, strict=True)])
        return ()

    def _layer(self, index: int, shapes: list[LayerShapes], keeps: str) -> Traced:
        layer, own, owner = self.module.layers[index], shapes[index], shapes[self.module.owners[index]]
        assert own.run is not None, "the layers were traced on a mesh"
        takes, gives = self.flags[index], self.flags[index + 1]
        part = Part(layer.kind, 0, takes=takes, gives=gives, label=self.module.label(index), run=own.run)
        context = Context(KEY if layer.kind.uses_key else None, owner.state)
        args = (owner.computed,), own.inputs, (context,)
        [(parts, _, make)] = mode(keeps).groups((part,))
        unit = make(parts, *args)
        known, rest = unit.saved[: len(unit.saved_inputs)], unit.saved[len(unit.saved_inputs) :]
        dy = flow.needed(flow.inexact(unit.outputs), part.gives)
        extra = aval_of(unit.beside)
        forward = jax.make_jaxpr(unit.forward)(*args)
        outputs = len(forward.jaxpr.outvars) - len(unit.saved)

        def backward(params: Avals, known: Any, rest: Any, contexts: Any, dy: Any, extra: Any) -> Any:
            return unit.backward(params, params, known, rest, contexts, dy, extra)

        if not unit.has_backward:
            nothing = jax.make_jaxpr(lambda *args: ())(args[0], known, rest)
            return Traced(forward, nothing, outputs, 0, (), 0)
        traced, shapes_made = jax.make_jaxpr(backward, return_shape=True)(args[0], known, rest, args[2], dy, extra)
        gradients = len(jax.tree.leaves(shapes_made[0]))
        waits = UnitHalves(unit, index == 0).pending if self._cut_in_two else []
        pending = sum(leaf.size * leaf.dtype.itemsize for leaf in waits)
        return Traced(forward, traced, outputs, gradients, tuple(unit.saved), len(known), pending)

    def _loss(self, shapes: list[LayerShapes], batch: Batch) -> Traced:
        """All of it is backward."""
        outputs, labels = shapes[-1].outputs, avals(batch[1])
        tail = Tail((), self.module.loss_fn, (), outputs, (), labels, self.precision, None, self.flags[-1])
        terms = self.module.loss_shapes(self.precision.outputs(outputs), labels, self.mesh)
        traced = jax.make_jaxpr(lambda x, labels, seed: tail.loss_and_gradient((), x, (), labels, Seeds(seed)))(
            outputs, labels, terms.total
        )
        nothing = jax.make_jaxpr(lambda: ())()
        return Traced(nothing, traced, 0, 0, (), 0)


def _with_rows(batch: Batch, rows: int) -> Batch:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), avals(batch))
