"""The backward of a stage as two ops, I and W, and what waits between them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxpipe.executor import flow, store
from jaxpipe.executor.pullback import Twice
from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.seeds import Seeds
from jaxpipe.executor.stage_program import MicroBatch, Segment, StageProgram
from jaxpipe.executor.store import Buffers, Entry, Store
from jaxpipe.executor.unit import repeated
from jaxpipe.executor.unit_halves import UnitHalves
from jaxpipe.mesh import on_tpu
from jaxpipe.model.context import Aux
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Leaves, Params, Tree


class _Waiting(NamedTuple):
    """A segment, its halves, and the places of what waits between them."""

    segment: Segment
    halves: UnitHalves
    entries: tuple[Entry, ...]


class StageHalves:
    """The ops I and W of a stage program.

    Args:
      program: the stage program.
      pending: where it gets places for what I keeps for W.
      saved_again: whether W reads what the forward has kept, so that it need not cross.

    Attributes:
      changes_grads: whether I has gradients of weights to add: those whose work is part of its own anyway, and those of a
        tail, which runs in I.
    """

    def __init__(self, program: StageProgram, pending: Store, saved_again: bool = False):
        self.program, self.kept, self.saved_again = program, pending.program(), saved_again
        in_order = on_tpu(program.weights.mesh)  # see `store`: W may want another order of the dims than I
        self._segments: list[_Waiting | None] = []
        for segment in program.segments:
            if not segment.has_backward:
                self._segments.append(None)
                continue
            halves = UnitHalves(segment.unit, segment.in_batch or saved_again, saved_again)
            entries = tuple(self.kept.take(halves.pending, segment.repeats, in_order))
            self._segments.append(_Waiting(segment, halves, entries))
        halves = [waiting.halves for waiting in self._segments if waiting is not None]
        self.changes_grads = program.tail is not None or any(any(each.early) for each in halves)

    @property
    def whole(self) -> list[str]:
        """The labels of parts with weights before the tail of which all work is done in I."""
        found: list[str] = []
        for waiting in self._segments:
            if waiting is not None and waiting.halves.early and all(waiting.halves.early):
                found += [part.label for part in waiting.segment.unit.parts if part.address is not None]
        return found

    def input_gradient(
        self,
        held: Twice,
        dy: Leaves,
        micro_batch: MicroBatch,
        buffers: Buffers,
        pending: Buffers,
        carried: Aux,
        grads: Params,
        extra: jax.Array | None = None,
    ) -> tuple[Leaves, Buffers, Params]:
        """I, without the tail: arguments as for `StageProgram.backward`.

        Returns:
          The gradient of the stage's input, `pending` with what W needs, and `grads` with what could not wait.
        """
        program = self.program
        for segment, waiting in zip(reversed(program.segments), reversed(self._segments), strict=True):
            unit = segment.unit
            if waiting is None:
                dy = [None for _ in split_inexact(unit.inputs)[0]]
                continue
            dy = flow.fitted(dy, unit.gives, split_inexact(unit.outputs)[0])

            def step(carry: Any, repeat: Repeat, waiting: _Waiting = waiting) -> Any:
                dy, touched, grads = carry
                segment, unit = waiting.segment, waiting.segment.unit
                repeat = segment.repeats - 1 - repeat
                parts = program.placed(unit.parts, micro_batch)
                params, contexts = program.operands(parts, held.params, carried, micro_batch, repeat)
                again = program.weights.take(held.again, parts, repeat)
                known, saved = program.kept_of(segment, micro_batch, buffers, repeat)
                dx, early, waits = waiting.halves.first(params, again, known, saved, contexts, dy, extra)
                touched = store.write(touched, self._slot(micro_batch), waiting.entries, repeat, waits)
                return dx, touched, self._added(grads, parts, repeat, unit.params, early)

            touched = {entry.buffer: pending[entry.buffer] for entry in waiting.entries}
            dy, touched, grads = repeated(step, (dy, touched, grads), segment.repeats)
            pending = {**pending, **touched}
        dx = flow.fitted(dy, program.stage.takes, split_inexact(program.stage.inputs)[0])
        return dx, pending, grads

    def weight_gradient(
        self,
        held: Twice,
        micro_batch: MicroBatch,
        buffers: Buffers,
        pending: Buffers,
        carried: Aux,
        grads: Params,
        start: Seeds,
    ) -> Params:
        """W: `grads` with those gradients added that have waited."""
        program = self.program
        for waiting in reversed(self._segments):
            if waiting is None or all(waiting.halves.early):
                continue

            def step(grads: Params, repeat: Repeat, waiting: _Waiting = waiting) -> Params:
                segment, unit = waiting.segment, waiting.segment.unit
                parts = program.placed(unit.parts, micro_batch)
                params, contexts = program.operands(parts, held.params, carried, micro_batch, repeat)
                again = program.weights.take(held.again, parts, repeat)
                known, saved = program.inputs_of(segment, micro_batch) if segment.in_batch else [], []
                if self.saved_again:
                    known, saved = program.kept_of(segment, micro_batch, buffers, repeat)
                waits = store.read(pending, self._slot(micro_batch), waiting.entries, repeat, waiting.halves.pending)
                late = waiting.halves.second(params, again, known, saved, contexts, start.extra, waits)
                return self._added(grads, parts, repeat, unit.params, late)

            grads = repeated(step, grads, waiting.segment.repeats)
        return grads

    def spoil(self, pending: Buffers, micro_batch: MicroBatch) -> Buffers:
        """The buffers with NaN in what waits of a micro-batch, for tests."""
        return self.kept.spoil(pending, self._slot(micro_batch))

    def _slot(self, micro_batch: MicroBatch) -> jax.Array:
        assert micro_batch.pending is not None, "nothing waits in this program"
        return micro_batch.pending

    def _added(
        self, grads: Params, parts: Sequence[Any], repeat: Repeat, taken: Tree, some: Sequence[jax.Array | None]
    ) -> Params:
        if all(gradient is None for gradient in some):
            return grads
        return self.program.weights.add(grads, parts, repeat, taken, some)
