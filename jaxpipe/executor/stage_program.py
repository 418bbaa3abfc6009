"""A stage as the ops that a rank runs: forward (keeps values) and backward (reads them and adds to the gradients)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.executor import store
from jaxpipe.executor.remat import Remat
from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.store import Buffers, Entry, Store
from jaxpipe.executor.tail import Tail, split_tail
from jaxpipe.executor.unit import Unit, repeated
from jaxpipe.executor.weights import Weights
from jaxpipe.model.stages import Part, Stage
from jaxpipe.types import Avals, Key, Leaves, LossFn, Params, Tree


class MicroBatch(NamedTuple):
    """What an op knows about its micro-batch on this data rank.

    Attributes:
      key: its PRNG key, or None without dropout.
      inputs, labels: leaves [B, ...].
      slot: the slot of the buffers that keeps its values, int32.
      first_layer: index of the first layer of the stage, int32.
    """

    key: Key | None
    inputs: Tree
    labels: Tree
    slot: jax.Array
    first_layer: jax.Array


@dataclass(frozen=True)
class Segment:
    """A unit and how often it repeats.

    Attributes:
      in_batch: its input is in the batch, so that the forward need not keep it.
      entries: the places of what it keeps.
    """

    unit: Unit
    repeats: int
    in_batch: bool
    entries: tuple[Entry, ...]

    @property
    def num_saved_inputs(self) -> int:
        """How many leaves of its input are among what the unit saves."""
        return len(self.unit.saved_inputs)

    @property
    def kept(self) -> list[jax.ShapeDtypeStruct]:
        """Abstract values of what has an entry."""
        return self.unit.saved[self.num_saved_inputs :] if self.in_batch else self.unit.saved


class StageProgram:
    """The ops of one distinct stage, captured.

    Args:
      stage: what to compute. The last one stops before its tail, which its backward runs.
      weights: what its rank computes with.
      buffers: where it gets places for what it keeps.
      remat: how it is cut into units.
      loss_fn, labels: of the tail; `labels` are abstract values of one micro-batch on one data rank.
      key: abstract value of the key of a micro-batch, or None.
    """

    def __init__(
        self,
        stage: Stage,
        weights: Weights,
        buffers: Store,
        remat: Remat,
        loss_fn: LossFn | None,
        labels: Avals,
        key: Key | None,
    ):
        self.stage, self.weights = stage, weights
        body, tail = split_tail(stage)
        cursor = buffers.cursor()
        self.segments: list[Segment] = []
        x = stage.inputs
        for parts, repeats, make in remat.groups(body):
            unit = make(parts, *self._operand_avals(parts, key, x))
            in_batch = stage.is_first and not self.segments and repeats == 1
            segment = Segment(unit, repeats, in_batch, ())
            self.segments.append(Segment(unit, repeats, in_batch, tuple(cursor.take(segment.kept, repeats))))
            x = unit.outputs
        self.tail: Tail | None = None
        self._tail_entries: tuple[Entry, ...] = ()
        if stage.is_last:
            params, _, layer_keys = self._operand_avals(tail, key, x)
            self.tail = Tail(tail, loss_fn, params, x, layer_keys, labels)
            if not self._tail_input_is_known:
                self._tail_entries = tuple(cursor.take(jax.tree.leaves(x), 1))

    @property
    def _tail_input_is_known(self) -> bool:
        return self.stage.is_first and not self.segments

    def _operand_avals(self, parts: tuple[Part, ...], key: Key | None, x: Avals) -> tuple[Avals, Avals, Avals]:
        """Abstract values of what a unit of these parts is called with: params, input and keys."""
        params = jax.eval_shape(lambda held: self.weights.take(held, parts, 0), self.weights.avals())
        first = jax.ShapeDtypeStruct((), jnp.int32)
        return params, x, jax.eval_shape(lambda k, i: _keys(parts, k, i, 0), key, first)

    def forward(self, held: Params, x: Tree, micro_batch: MicroBatch, buffers: Buffers) -> tuple[Tree, Buffers]:
        """Runs the stage up to the tail; returns its output, and the buffers with what the backward needs."""
        for segment in self.segments:
            drop = segment.num_saved_inputs if segment.in_batch else 0

            def step(carry: Any, repeat: Repeat, segment: Segment = segment, drop: int = drop) -> Any:
                x, buffers = carry
                params, layer_keys = self._operands(segment.unit, held, micro_batch, repeat)
                y, saved = segment.unit.forward(params, x, layer_keys)
                return (y, store.write(buffers, micro_batch.slot, segment.entries, repeat, saved[drop:]))

            touched = {entry.buffer: buffers[entry.buffer] for entry in segment.entries}
            x, touched = repeated(step, (x, touched), segment.repeats)
            buffers = {**buffers, **touched}
        if self._tail_entries:
            buffers = store.write(buffers, micro_batch.slot, self._tail_entries, 0, jax.tree.leaves(x))
        return x, buffers

    def backward(
        self, held: Params, dy: Leaves, micro_batch: MicroBatch, buffers: Buffers, grads: Params
    ) -> tuple[Leaves, Params]:
        """From the gradient of the output (inexact leaves) to that of the input; adds those of the params to `grads`."""
        for segment in reversed(self.segments):
            unit = segment.unit

            def step(carry: Any, repeat: Repeat, segment: Segment = segment, unit: Unit = unit) -> Any:
                dy, grads = carry
                repeat = segment.repeats - 1 - repeat
                params, layer_keys = self._operands(unit, held, micro_batch, repeat)
                saved = store.read(buffers, micro_batch.slot, segment.entries, repeat, segment.kept)
                if segment.in_batch:
                    inputs = jax.tree.leaves(micro_batch.inputs)
                    known = [inputs[i] for i in unit.saved_inputs]
                else:
                    known, saved = saved[: segment.num_saved_inputs], saved[segment.num_saved_inputs :]
                dparams, dx = unit.backward(params, known, saved, layer_keys, dy)
                return (dx, self.weights.add(grads, unit.parts, repeat, unit.params, dparams))

            dy, grads = repeated(step, (dy, grads), segment.repeats)
        return dy, grads

    def loss_and_gradient(
        self, held: Params, micro_batch: MicroBatch, buffers: Buffers, grads: Params, seed: jax.Array
    ) -> tuple[jax.Array, Leaves, Params]:
        """Runs the tail: (total of the loss, gradient of the tail's input, `grads` with those of its params added)."""
        tail = self.tail
        assert tail is not None, "only the last stage has a tail"
        x = micro_batch.inputs
        if not self._tail_input_is_known:
            leaves, structure = jax.tree.flatten(tail.inputs)
            x = jax.tree.unflatten(structure, store.read(buffers, micro_batch.slot, self._tail_entries, 0, leaves))
        params = self.weights.take(held, tail.parts, 0)
        layer_keys = _keys(tail.parts, micro_batch.key, micro_batch.first_layer, 0)
        total, dparams, dx = tail.loss_and_gradient(params, x, layer_keys, micro_batch.labels, seed)
        return total, dx, self.weights.add(grads, tail.parts, 0, tail.params, dparams)

    def _operands(self, unit: Unit, held: Params, micro_batch: MicroBatch, repeat: Repeat) -> tuple[Tree, Tree]:
        layer_keys = _keys(unit.parts, micro_batch.key, micro_batch.first_layer, repeat)
        return self.weights.take(held, unit.parts, repeat), layer_keys


def _keys(parts: tuple[Part, ...], key: Key | None, first_layer: jax.Array, repeat: Repeat) -> list[Key | None]:
    return [part.keys(key, first_layer + part.offset + repeat * part.count) for part in parts]
