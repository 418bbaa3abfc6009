"""A stage as three functions: forward (saves), backward (reads what was saved, adds to the gradients), evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.executor import store
from jaxpipe.executor.store import Buffers, Entry, Store
from jaxpipe.executor.unit import Unit, split_inexact
from jaxpipe.model.loss import loss_terms
from jaxpipe.model.stages import Part, Stage
from jaxpipe.types import Leaves, LossFn, Params, Tree


@dataclass(frozen=True)
class _Segment:
    """A unit and how often it repeats, with the place of what it saves."""

    unit: Unit
    repeats: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What an op knows about its micro-batch: the key (or None), its inputs and labels, and the saved slot."""

    key: jax.Array | None
    inputs: Tree
    labels: Tree
    slot: jax.Array


class StageProgram:
    """The functions of one distinct stage.

    The trailing single layers of the last stage and the loss form the *tail*. It runs in the backward op alone, forward
    and backward at once: the forward op stops before it and saves the tail's input. So logits are never kept, and the
    output projection is never computed twice, whatever the rematerialisation.

    Args:
      stage: what to compute.
      params: abstract values of a rank's params, `{"stacked": ..., "shared": ...}` with the rank dim removed.
      buffers: planned here, allocated by the loop.
      remat: see `Config.remat`.
      key: abstract value of a micro-batch key, or None.
    """

    def __init__(self, stage: Stage, params: Params, buffers: Store, remat: Any, loss_fn: LossFn | None, key: Any):
        self.stage, self.loss_fn = stage, loss_fn
        body, self.tail = split_tail(stage)
        cursor = buffers.cursor()
        self.segments: list[_Segment] = []
        x = stage.inputs
        first_layer = jax.ShapeDtypeStruct((), jnp.int32)
        for parts, repeats, policy in _group(body, remat):
            held = jax.eval_shape(lambda p, parts=parts: [take(p, part, 0) for part in parts], params)
            keys = jax.eval_shape(lambda k, i, parts=parts: _keys(parts, k, i, 0), key, first_layer)
            unit = Unit(parts, policy, held, x, keys)
            known = (
                stage.is_first and not self.segments and repeats == 1
            )  # its input is in the batch: need not be saved
            saved = unit.saved[len(unit.saved_inputs) :] if known else unit.saved
            self.segments.append(_Segment(unit, repeats, tuple(cursor.take(saved, repeats))))
            x = unit.outputs
        self._tail_input = x
        self._tail_known = stage.is_first and not self.segments
        saved = [] if not stage.is_last or self._tail_known else jax.tree.leaves(x)
        self._tail_entries = tuple(cursor.take(saved, 1))

    def forward(
        self, params: Params, x: Tree, micro_batch: MicroBatch, first_layer: jax.Array, buffers: Buffers
    ) -> tuple[Tree, Buffers]:
        """Runs the stage up to the tail; returns its output and the buffers with what the backward needs."""
        for number, segment in enumerate(self.segments):
            drop = len(segment.unit.saved_inputs) if self._is_known(number) else 0

            def step(carry: Any, repeat: Any, segment: _Segment = segment, drop: int = drop) -> tuple[Any, None]:
                x, buffers = carry
                held, keys = self._operands(segment, params, micro_batch, first_layer, repeat)
                y, saved = segment.unit.forward(held, x, keys)
                return (y, store.write(buffers, micro_batch.slot, segment.entries, repeat, saved[drop:])), None

            touched = {entry.buffer: buffers[entry.buffer] for entry in segment.entries}
            (x, touched), _ = _repeat(step, (x, touched), segment.repeats)
            buffers = {**buffers, **touched}
        if self._tail_entries:
            buffers = store.write(buffers, micro_batch.slot, self._tail_entries, 0, jax.tree.leaves(x))
        return x, buffers

    def backward(
        self,
        params: Params,
        dy: Leaves,
        micro_batch: MicroBatch,
        first_layer: jax.Array,
        buffers: Buffers,
        grads: Params,
    ) -> tuple[Leaves, Params]:
        """From the gradient of the output (inexact leaves) to that of the input; adds the params' to `grads`."""
        for number in reversed(range(len(self.segments))):
            segment = self.segments[number]
            inputs = micro_batch.inputs if self._is_known(number) else None
            saved_avals = segment.unit.saved[len(segment.unit.saved_inputs) if inputs is not None else 0 :]

            def step(
                carry: Any,
                repeat: Any,
                segment: _Segment = segment,
                inputs: Tree = inputs,
                saved_avals: Sequence[jax.ShapeDtypeStruct] = saved_avals,
            ) -> tuple[Any, None]:
                dy, grads = carry
                repeat = segment.repeats - 1 - repeat
                held, keys = self._operands(segment, params, micro_batch, first_layer, repeat)
                saved = store.read(buffers, micro_batch.slot, segment.entries, repeat, saved_avals)
                dparams, dx = segment.unit.backward(held, saved, keys, dy, inputs)
                return (dx, add(grads, segment.unit.parts, repeat, segment.unit.params, dparams)), None

            (dy, grads), _ = _repeat(step, (dy, grads), segment.repeats)
        return dy, grads

    def loss_and_grad(
        self,
        params: Params,
        micro_batch: MicroBatch,
        first_layer: jax.Array,
        buffers: Buffers,
        grads: Params,
        seed: jax.Array,
    ) -> tuple[jax.Array, Leaves, Params]:
        """Runs the tail of the last stage: (total of the loss, gradient of the tail's input, grads with the tail's added).

        `seed` is the gradient of the mean loss by this total: what the backward pass starts from.
        """
        if self._tail_known:
            x = micro_batch.inputs
        else:
            leaves, structure = jax.tree.flatten(self._tail_input)
            x = jax.tree.unflatten(structure, store.read(buffers, micro_batch.slot, self._tail_entries, 0, leaves))
        held = [take(params, part, 0) for part in self.tail]
        keys = _keys(self.tail, micro_batch.key, first_layer, 0)
        param_leaves, with_params = split_inexact(held)
        x_leaves, with_x = split_inexact(x)

        def loss(param_leaves: Leaves, x_leaves: Leaves) -> jax.Array:
            y = _run(self.tail, with_params(param_leaves), with_x(x_leaves), keys, train=True)
            return loss_terms(self.loss_fn, y, micro_batch.labels).total

        total, pullback = jax.vjp(loss, param_leaves, x_leaves)
        dparams, dx = pullback(seed)
        return total, dx, add(grads, self.tail, 0, held, dparams)

    def _is_known(self, number: int) -> bool:
        return self.stage.is_first and number == 0 and self.segments[0].repeats == 1

    def _operands(
        self, segment: _Segment, params: Params, micro_batch: MicroBatch, first_layer: jax.Array, repeat: Any
    ) -> tuple[Tree, Tree]:
        held = [take(params, part, repeat) for part in segment.unit.parts]
        return held, _keys(segment.unit.parts, micro_batch.key, first_layer, repeat)


def split_tail(stage: Stage) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of a stage up to its tail, and the tail: the trailing single layers of the last stage."""
    parts, start = stage.parts, len(stage.parts)
    while stage.is_last and start and parts[start - 1].count == 1 and parts[start - 1].stack is None:
        start -= 1
    return parts[:start], parts[start:]


def evaluate(parts: Sequence[Part], params: Params, x: Tree) -> Tree:
    """Parts of a stage in evaluation mode; nothing is saved."""
    for part in parts:

        def step(x: Tree, repeat: Any, part: Part = part) -> tuple[Tree, None]:
            one = replace(part, count=1)
            return one.apply(take(params, one, repeat), x, None, False), None

        x, _ = _repeat(step, x, part.count)
    return x


def _group(parts: Sequence[Part], remat: Any) -> list[tuple[tuple[Part, ...], int, Any]]:
    """(parts of a unit, repeats, policy) for each segment, under a rematerialisation mode."""
    if remat == "stage":
        return [(tuple(parts), 1, None)] if parts else []
    groups: list[tuple[tuple[Part, ...], int, Any]] = []
    for part in parts:
        if isinstance(remat, int):
            whole, rest = divmod(part.count, remat)
            if whole:
                groups.append(((replace(part, count=remat),), whole, None))
            if rest:
                done = whole * remat
                left = replace(part, count=rest, offset=part.offset + done, slot=part.slot + done)
                groups.append(((left,), 1, None))
        else:
            policy = {"layer": None, "none": "everything"}[remat] if isinstance(remat, str) else remat
            groups.append(((replace(part, count=1),), part.count, policy))
    return groups


def _repeat(step: Any, carry: Any, repeats: int) -> tuple[Any, None]:
    """`lax.scan` over the repeats; a single one is inlined with a static index."""
    if repeats == 1:
        return step(carry, 0)
    return jax.lax.scan(step, carry, jnp.arange(repeats, dtype=jnp.int32))


def _run(parts: Sequence[Part], held: Tree, x: Tree, keys: Tree, train: bool) -> Tree:
    for part, params, key in zip(parts, held, keys, strict=True):
        x = part.apply(params, x, key, train)
    return x


def _keys(parts: Sequence[Part], key: jax.Array | None, first_layer: jax.Array, repeat: Any) -> list[Any]:
    return [part.keys(key, first_layer + part.offset + repeat * part.count) for part in parts]


def take(params: Params, part: Part, repeat: Any) -> Params:
    """The params that repetition `repeat` of a part computes with, from a rank's params."""
    if part.shared is not None:
        return params["shared"][part.shared]
    if part.stack is None:
        return {}
    at = part.slot + repeat * part.count
    if part.count == 1:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), params["stacked"][part.stack]
        )
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, part.count), params["stacked"][part.stack])


def add(grads: Params, parts: Sequence[Part], repeat: Any, held: Tree, dparams: Leaves) -> Params:
    """`grads` with the gradients of the inexact leaves of the held params added, in place as XLA sees it."""
    grads = {group: dict(entries) for group, entries in grads.items()}
    remaining = list(dparams)
    for part, params in zip(parts, held, strict=True):
        count = sum(1 for _ in split_inexact(params)[0])
        mine, remaining = remaining[:count], remaining[count:]
        if part.shared is not None:
            group, name = "shared", part.shared
        elif part.stack is not None:
            group, name = "stacked", part.stack
        else:
            continue
        old, rebuild = split_inexact(grads[group][name])
        if group == "shared":
            new = [g + d.astype(g.dtype) for g, d in zip(old, mine, strict=True)]
        else:
            at = part.slot + repeat * part.count
            index = at if part.count == 1 else at + jnp.arange(part.count, dtype=jnp.int32)
            new = [g.at[index].add(d.astype(g.dtype)) for g, d in zip(old, mine, strict=True)]
        grads[group][name] = rebuild(new)
    return grads
