"""What a compiled step will do, planned on shapes alone, outside of the step.

A plan holds the distinct stage programs, what is kept between forward and backward, and what travels. Nothing in it has
been computed: it can be made for devices that are not there, printed, and asked for the bytes that a rank will need.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
from jax.sharding import Mesh

from jaxpipe.executor import seeds
from jaxpipe.executor.batch import micro_batch_avals
from jaxpipe.executor.begin import begins
from jaxpipe.executor.flow import needed
from jaxpipe.executor.order import check_order
from jaxpipe.executor.remat import Remat, RematOption, mode
from jaxpipe.executor.stage_halves import StageHalves
from jaxpipe.executor.stage_program import StageProgram
from jaxpipe.executor.states import States
from jaxpipe.executor.store import Store
from jaxpipe.executor.weights import Weights
from jaxpipe.executor.wire import Codec
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.stages import Stage, make_stages
from jaxpipe.layout.state_layout import state_layout
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import PENDING, Program
from jaxpipe.mesh import on_tpu
from jaxpipe.model.abstract import with_axes
from jaxpipe.model.context import Aux
from jaxpipe.model.dependence import behind_weights
from jaxpipe.model.reports import check_names, named_aux, training_metrics
from jaxpipe.model.shapes import aval, describe
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Batch, Key

Made = TypeVar("Made")
Wanted = TypeVar("Wanted")


def distinct(
    stages: Sequence[Wanted], make: Callable[[Wanted], Made], key: Callable[[Wanted], object] = Stage.program_key
) -> tuple[list[Made], list[int]]:
    """One thing per distinct stage, and per stage the number of its own.

    Args:
      key: equal for stages that are not distinct.
    """
    numbers: dict[object, int] = {}
    made: list[Made] = []
    keys = [key(stage) for stage in stages]
    for stage, own in zip(stages, keys, strict=True):
        if own not in numbers:
            numbers[own] = len(made)
            made.append(make(stage))
    return made, [numbers[own] for own in keys]


class TrainPlan:
    """The plan of a training step.

    Args:
      layout: of the params tree.
      mesh: the devices.
      program: the lowered schedule. Of one with I and W the plan may take another one; see `self.program`.
      remat: what is kept for the backward; see `Config.remat`.
      batch: abstract values or arrays, leaves [M, B, ...].
      key: that of the step or its abstract value; None: without dropout.

    Attributes:
      terms: abstract values of the loss of one micro-batch.
      outputs, labels: abstract values of one micro-batch on one data rank, as the loss gets them.
      beside: abstract values of what each layer gives beside its output.
      metrics: those of the metrics of `loss_fn`, by name.
      extra: that of the seed of extra losses, or None if no layer has any.
      programs: the distinct stage programs; `program_ids[stage]` is the number of the one that a stage runs.
      halves: their backwards as two ops, by the numbers of those of which the schedule wants that.
      store, pending: the buffers of what forwards keep, and of what waits between the two ops of a backward.
      states: the state of the layers.
      codecs: per kind of value, how it travels.

    Raises:
      LayerError, LossError, DataError: the model does not fit itself or the batch.
      ScheduleError: the layers have state, and the schedule does not keep the order of the micro-batches.
    """

    def __init__(self, layout: Layout, mesh: Mesh, program: Program, remat: RematOption, batch: Batch, key: Key | None):
        module = layout.module
        self.layout, self.mesh, self.program = layout, mesh, program
        key_aval: Avals = None if key is None else aval(key)
        inputs, self.labels = (micro_batch_avals(tree, mesh) for tree in batch)
        self.num_micro_batches = jax.tree.leaves(batch[0])[0].shape[0]
        states = None if layout.states is None else layout.states.layer_params
        shapes = module.shapes(inputs, layout.layer_params, states, key=key_aval, mesh=mesh, precision=layout.precision)
        self.stages = make_stages(layout, shapes, behind_weights(shapes, module.owners, layout.frozen.of))
        check_order(program, self.stages)
        self.states = States(state_layout(layout, shapes), mesh, self.stages)
        self.outputs: Avals = layout.precision.outputs(shapes[-1].outputs)
        self.terms = module.loss_shapes(self.outputs, self.labels, mesh)
        self.beside = [layer.aux for layer in shapes]
        self.metrics = training_metrics(module.loss_fn, self.outputs, self.labels, mesh)
        check_names(named_aux(module.label, shapes), self.metrics)
        self.extra = seeds.aval_of(self.beside)
        behind = self.stages[1:]
        gradients = [needed(split_inexact(stage.inputs)[0], stage.takes) for stage in behind]
        self.codecs = {Y: Codec([stage.inputs for stage in behind]), DX: Codec(gradients)}
        self.weights, self.store, self.pending = Weights(layout, mesh), Store(), Store()
        self.programs: list[StageProgram] = []
        self.halves: dict[int, StageHalves] = {}
        self.program_ids: list[int] = []
        with_axes(mesh, functools.partial(self._capture, mode(remat), key_aval))()

    def _capture(self, remat: Remat, key: Avals) -> tuple[()]:
        loss_fn = self.layout.module.loss_fn

        begin = begins(self.stages)
        # Two at least: with one slot the buffer is the input, and XLA would run the tail's first product, which then
        # depends on nothing in its branch, in front of the branch: in every tick of every rank.
        tail_slots = 0 if self.program.schedule.num_chunks == 1 else max(self.program.last_stage_slots(), 2)

        in_two = {cell.stage for row in self.program.cells for cell in row if cell.kind == "I"}

        def captured(stage: Stage) -> StageProgram:
            known = loss_fn, self.labels, key, Aux(self.states.avals()), self.extra, begin[stage.program_key()]
            slots = tail_slots if stage.is_last else 0
            return StageProgram(stage, self.weights, self.store, remat, *known, slots, bool(in_two))

        self.programs, self.program_ids = distinct(self.stages, captured)
        if PENDING not in self.program.pools:
            self._settle(self.program, {}, Store())
            return ()
        # Either what a forward keeps is free after I, and what W needs of it is copied to what waits, or it stays where it
        # is until W. Which of both is less memory depends on the table and on the layers. For like layers in ZB-H1 the pool
        # of what is kept is as large in either way, since the first rank needs that much for I alone: it stays.
        numbers = sorted({self.program_ids[stage] for stage in in_two})
        found: list[tuple[int, Program, dict[int, StageHalves], Store]] = []
        for program in (self.program, lower(self.program.schedule, saved_until_w=True)):
            pending = Store()
            halves = {n: StageHalves(self.programs[n], pending, program.saved_until_w) for n in numbers}
            self._settle(program, halves, pending)
            found.append((_bytes(self.store.avals()) + _bytes(pending.avals()), program, halves, pending))
        _, self.program, self.halves, self.pending = min(found, key=lambda each: each[0])
        self._settle(self.program, self.halves, self.pending)
        return ()

    def _settle(self, program: Program, halves: Mapping[int, StageHalves], pending: Store) -> None:
        """Gives both pools as many slots as a program needs."""
        for pool, per_rank, kept_by in (
            (self.store, program.saved_per_rank, dict(enumerate(each.kept for each in self.programs))),
            (pending, program.pending_per_rank, {n: each.kept for n, each in halves.items()}),
        ):
            numbers = {id(kept): number for number, kept in enumerate(pool.programs)}
            slots = [0] * len(numbers)
            together: list[set[int]] = [set() for _ in range(program.num_ranks)]
            for program_id, rank in zip(self.program_ids, self.layout.placement, strict=True):
                if program_id not in kept_by:
                    continue
                number = numbers[id(kept_by[program_id])]
                slots[number] = max(slots[number], per_rank[rank])
                together[rank].add(number)
                tail = self.programs[program_id].kept_by_tail
                if tail is not None and pool is self.store:
                    slots[numbers[id(tail)]] = self.programs[program_id].tail_slots
            pool.settle(slots, together)

    @property
    def whole_in_i(self) -> list[str]:
        """Labels of layers with trained weights of which W has nothing to do: their backward could not be cut."""
        return list(dict.fromkeys(label for halves in self.halves.values() for label in halves.whole))

    def bytes_per_rank(self) -> dict[str, int]:
        """What a device holds during a step, in bytes, by category; each the largest need of any rank.

        "weights" are those it computes with, "gradients" the sums that are added up, "saved" what forwards keep for
        backwards, "pending" what I keeps for W (if the schedule has such ops), "messages" what has arrived and was not
        read yet, and what was sent last. The last three are at most so much where the mesh has further axes: the compiler
        may cut them, too. On a TPU there are also the "weights for derivatives", at most so much: those that derivatives
        want in another layout than forwards do.
        """
        held = self.weights.avals()
        sums = jax.eval_shape(self.weights.blank_gradients, held)
        messages = [(size + 1) * _bytes(self.codecs[value].spec) for value, size in self.program.inboxes.items()]
        weights, gradients = (self.weights.bytes_on_a_device(tree) for tree in (held, sums))
        again = {"weights for derivatives": weights} if on_tpu(self.mesh) else {}
        kept = {"saved": _bytes(self.store.avals())}
        if PENDING in self.program.pools:
            kept["pending"] = _bytes(self.pending.avals())
        return {"weights": weights, **again, "gradients": gradients, **kept, "messages": sum(messages)}

    def __str__(self) -> str:
        lines = [f"{len(self.stages)} stages, {len(self.programs)} distinct programs"]
        for number, program in enumerate(self.programs):
            stages = [str(s) for s, own in enumerate(self.program_ids) if own == number]
            units = ", ".join(
                f"{segment.repeats} x {'+'.join(part.label for part in segment.unit.parts)}"
                for segment in program.segments
            )
            tail = "" if program.tail is None else f", tail of {len(program.tail.parts)} layers and the loss"
            lines.append(f"program {number} (stages {' '.join(stages)}): {units or 'no unit'}{tail}")
        for value, codec in self.codecs.items():
            lines.append(f"{value} travels as {describe(codec.spec)}")
        lines += [f"{name}: {count:,} bytes" for name, count in self.bytes_per_rank().items()]
        return "\n".join(lines)


def _bytes(leaves: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))
