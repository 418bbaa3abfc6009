"""A stage as the ops that a rank runs: forward (keeps values) and backward (reads them and adds to the gradients)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.executor import beside, flow, store
from jaxpipe.executor.begin import AT_ZERO, Begin
from jaxpipe.executor.pullback import Twice
from jaxpipe.executor.remat import Remat
from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.seeds import Seeds
from jaxpipe.executor.store import Buffers, Entry, Store
from jaxpipe.executor.tail import Tail, split_tail
from jaxpipe.executor.unit import Unit, repeated
from jaxpipe.executor.weights import Weights
from jaxpipe.layout.stages import Part, Stage
from jaxpipe.mesh import on_tpu
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Key, Leaves, LossFn, Params, Tree


class MicroBatch(NamedTuple):
    """What an op knows about its micro-batch on this data rank.

    Attributes:
      key: its PRNG key, or None without dropout.
      inputs, labels: leaves [B, ...].
      slot: the slot of the buffers that keeps its values, int32.
      pending: that of the buffers that keep what waits between I and W, int32; None: nothing does.
      first_layer: index of the first layer of the stage, int32.
      stage, number: those of the stage and of the micro-batch, int32.
    """

    key: Key | None
    inputs: Tree
    labels: Tree
    slot: jax.Array
    first_layer: jax.Array
    stage: jax.Array
    number: jax.Array
    pending: jax.Array | None = None


@dataclass(frozen=True)
class Segment:
    """A unit and how often it repeats.

    Attributes:
      in_batch: its input is in the batch, so that the forward need not keep it.
      entries: the places of what it keeps.
      has_backward: whether it has one: not if nothing in it and before it is trained. Then nothing is kept for it.
    """

    unit: Unit
    repeats: int
    in_batch: bool
    entries: tuple[Entry, ...]
    has_backward: bool = True

    @property
    def num_saved_inputs(self) -> int:
        """How many leaves of its input are among what the unit saves."""
        return len(self.unit.saved_inputs)

    @property
    def kept(self) -> list[jax.ShapeDtypeStruct]:
        """Abstract values of what has an entry."""
        if not self.has_backward:
            return []
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
      carried: abstract values of what the rank carries beside.
      extra: abstract value of the seed of the extra losses of the whole model, or None if it has none.
      begin: where the stages that run it begin in the arrays of their ranks.
      tail_slots: if it is the last stage, of a rank with several, it keeps the input of its tail in so many slots of its
        own, micro-batch m in slot m modulo `tail_slots`: else the rank would have room for it in each slot of its other
        stages. 0: it does not.
      in_two: whether its backward is taken apart: I may want what a forward keeps in another order of the dims than the
        forward does (see `store`).
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
        carried: Aux,
        extra: Avals = None,
        begin: Begin = AT_ZERO,
        tail_slots: int = 0,
        in_two: bool = False,
    ):
        self.stage, self.weights, self._carried, self._begin = stage, weights, carried, begin
        body, tail = split_tail(stage)
        self.kept = cursor = buffers.program()
        self.segments: list[Segment] = []
        x = stage.inputs
        for parts, repeats, make in remat.groups(body):
            unit = make(parts, *self._operand_avals(parts, key, x))
            in_batch = stage.is_first and not self.segments and repeats == 1
            segment = Segment(unit, repeats, in_batch, (), unit.has_backward)
            # Elsewhere it would only be in the way of fusions.
            in_order = (unit.keeps_results or in_two) and on_tpu(weights.mesh)
            entries = tuple(cursor.take(segment.kept, repeats, in_order))
            self.segments.append(replace(segment, entries=entries))
            x = unit.outputs
        self.tail: Tail | None = None
        self.tail_slots, self.kept_by_tail = tail_slots, None
        self._tail_entries: tuple[Entry, ...] = ()
        if stage.is_last:
            params, _, contexts = self._operand_avals(tail, key, x)
            takes = tail[0].takes if tail else stage.gives
            self.tail = Tail(tail, loss_fn, params, x, contexts, labels, weights.layout.precision, extra, takes)
            if not self.tail_input_is_known:
                self.kept_by_tail = buffers.program() if tail_slots else None
                cursor = self.kept_by_tail or cursor
                # A buffer of its own would be laid out as the tail wants it, and copied in each tick.
                in_order = bool(tail_slots) and on_tpu(weights.mesh)
                self._tail_entries = tuple(cursor.take(jax.tree.leaves(x), 1, in_order, apart=bool(tail_slots)))

    @property
    def tail_input_is_known(self) -> bool:
        return self.stage.is_first and not self.segments

    def _operand_avals(self, parts: tuple[Part, ...], key: Key | None, x: Avals) -> tuple[Avals, Avals, Avals]:
        """Abstract values of what a unit of these parts is called with: params, input and contexts."""
        params = jax.eval_shape(lambda held: self.weights.take(held, parts, 0), self.weights.avals())
        first = jax.ShapeDtypeStruct((), jnp.int32)
        contexts = jax.eval_shape(lambda c, k, i: beside.contexts(parts, c, k, i, 0), self._carried, key, first)
        return params, x, contexts

    def forward(
        self, held: Params, x: Tree, micro_batch: MicroBatch, buffers: Buffers, carried: Aux
    ) -> tuple[Tree, Buffers, Aux]:
        """Runs the stage up to the tail.

        Args:
          carried: what the rank carries beside; see `executor/beside.py`.

        Returns:
          The output, the buffers with what the backward needs, and what is carried beside from here on.
        """
        for segment in self.segments:
            drop = segment.num_saved_inputs if segment.in_batch else 0

            def step(carry: Any, repeat: Repeat, segment: Segment = segment, drop: int = drop) -> Any:
                x, buffers, carried = carry
                parts = self.placed(segment.unit.parts, micro_batch)
                params, contexts = self.operands(parts, held, carried, micro_batch, repeat)
                y, found, saved = segment.unit.forward(params, x, contexts)
                if segment.has_backward:
                    buffers = store.write(buffers, micro_batch.slot, segment.entries, repeat, saved[drop:])
                return y, buffers, beside.record(carried, parts, repeat, found)

            touched = {entry.buffer: buffers[entry.buffer] for entry in segment.entries}
            x, touched, carried = repeated(step, (x, touched, carried), segment.repeats)
            buffers = {**buffers, **touched}
        if self._tail_entries:
            buffers = store.write(buffers, self._tail_slot(micro_batch), self._tail_entries, 0, jax.tree.leaves(x))
        return x, buffers, carried

    def backward(
        self,
        held: Twice,
        dy: Leaves,
        micro_batch: MicroBatch,
        buffers: Buffers,
        carried: Aux,
        grads: Params,
        extra: jax.Array | None = None,
    ) -> tuple[Leaves, Params]:
        """From the gradient of the output (see `flow`) to that of the input; adds those of the params to `grads`.

        Args:
          extra: the gradient of the objective by each extra loss; see `seeds`.
        """
        for segment in reversed(self.segments):
            unit = segment.unit
            if not segment.has_backward:
                dy = [None for _ in split_inexact(unit.inputs)[0]]
                continue
            dy = flow.fitted(dy, unit.gives, split_inexact(unit.outputs)[0])

            def step(carry: Any, repeat: Repeat, segment: Segment = segment, unit: Unit = unit) -> Any:
                dy, grads = carry
                repeat = segment.repeats - 1 - repeat
                parts = self.placed(unit.parts, micro_batch)
                params, contexts = self.operands(parts, held.params, carried, micro_batch, repeat)
                again = self.weights.take(held.again, parts, repeat)
                known, saved = self.kept_of(segment, micro_batch, buffers, repeat)
                dparams, dx = unit.backward(params, again, known, saved, contexts, dy, extra)
                return (dx, self.weights.add(grads, parts, repeat, unit.params, dparams))

            dy, grads = repeated(step, (dy, grads), segment.repeats)
        return flow.fitted(dy, self.stage.takes, split_inexact(self.stage.inputs)[0]), grads

    def loss_and_gradient(
        self, held: Params, micro_batch: MicroBatch, buffers: Buffers, carried: Aux, grads: Params, start: Seeds
    ) -> tuple[jax.Array, Leaves, Params, Aux]:
        """Runs the tail.

        Returns:
          The total of the loss, the gradient of the tail's input, `grads` with those of its params added, and what is
          carried beside from here on.
        """
        tail = self.tail
        assert tail is not None, "only the last stage has a tail"
        x = self.tail_input(micro_batch, buffers)
        parts = self.placed(tail.parts, micro_batch)
        params, contexts = self.operands(parts, held, carried, micro_batch, 0)
        made = tail.loss_and_gradient(params, x, contexts, micro_batch.labels, start)
        total, metrics, found, dparams, dx = made
        carried = beside.joined(beside.record(carried, parts, 0, found), metrics)
        return total, dx, self.weights.add(grads, parts, 0, tail.params, dparams), carried

    def tail_input(self, micro_batch: MicroBatch, buffers: Buffers) -> Tree:
        """The input of the tail."""
        assert self.tail is not None, "only the last stage has a tail"
        if self.tail_input_is_known:
            return micro_batch.inputs
        leaves, structure = jax.tree.flatten(self.tail.inputs)
        slot = self._tail_slot(micro_batch)
        return jax.tree.unflatten(structure, store.read(buffers, slot, self._tail_entries, 0, leaves))

    def kept_of(
        self, segment: Segment, micro_batch: MicroBatch, buffers: Buffers, repeat: Repeat
    ) -> tuple[Leaves, Leaves]:
        """What a repetition of a segment has kept: leaves of its input, which may be in the batch, and the rest."""
        saved = store.read(buffers, micro_batch.slot, segment.entries, repeat, segment.kept)
        if segment.in_batch:
            return self.inputs_of(segment, micro_batch), saved
        return saved[: segment.num_saved_inputs], saved[segment.num_saved_inputs :]

    def inputs_of(self, segment: Segment, micro_batch: MicroBatch) -> Leaves:
        """What a segment whose input is in the batch would keep of it."""
        inputs = jax.tree.leaves(micro_batch.inputs)
        return [inputs[i] for i in segment.unit.saved_inputs]

    def placed(self, parts: Sequence[Part], micro_batch: MicroBatch) -> list[Part]:
        """Some parts with their slots counted as on the rank of the stage that runs."""
        return self._begin.placed(parts, micro_batch.stage)

    def _tail_slot(self, micro_batch: MicroBatch) -> jax.Array:
        return micro_batch.number % self.tail_slots if self.tail_slots else micro_batch.slot

    def spoil(self, buffers: Buffers, micro_batch: MicroBatch) -> Buffers:
        """The buffers with NaN in what is kept of a micro-batch, for tests."""
        return self.kept.spoil(buffers, micro_batch.slot)

    def spoil_tail(self, buffers: Buffers, micro_batch: MicroBatch) -> Buffers:
        """The same of the input of the tail, if that has slots of its own."""
        return buffers if self.kept_by_tail is None else self.kept_by_tail.spoil(buffers, self._tail_slot(micro_batch))

    def operands(
        self, parts: Sequence[Part], held: Params, carried: Aux, micro_batch: MicroBatch, repeat: Repeat
    ) -> tuple[Tree, list[Context]]:
        """Params and contexts of one repetition of some parts."""
        contexts = beside.contexts(parts, carried, micro_batch.key, micro_batch.first_layer, repeat)
        return self.weights.take(held, parts, repeat), contexts
