"""What a compiled step will do, planned on shapes alone, outside of the step.

A plan holds the distinct stage programs, what is kept between forward and backward, and what travels. Nothing in it has
been computed: it can be made for devices that are not there, printed, and asked for the bytes that a rank will need.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax.sharding import Mesh

from jaxpipe.executor.batch import micro_batch_avals
from jaxpipe.executor.remat import Remat, RematOption, mode
from jaxpipe.executor.stage_program import StageProgram
from jaxpipe.executor.store import Store
from jaxpipe.executor.unit import split_inexact
from jaxpipe.executor.weights import Weights
from jaxpipe.executor.wire import Codec
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.program import SAVED, Program
from jaxpipe.model.abstract import with_axes
from jaxpipe.model.layout import Layout
from jaxpipe.model.shapes import aval, describe
from jaxpipe.model.stages import Stage, make_stages
from jaxpipe.types import Avals, Batch, Key

Made = TypeVar("Made")


def distinct(stages: Sequence[Stage], make: Callable[[Stage], Made]) -> tuple[list[Made], list[int]]:
    """One thing per distinct stage, and per stage the number of its own."""
    numbers: dict[object, int] = {}
    made: list[Made] = []
    for stage in stages:
        if stage.program_key() not in numbers:
            numbers[stage.program_key()] = len(made)
            made.append(make(stage))
    return made, [numbers[stage.program_key()] for stage in stages]


class TrainPlan:
    """The plan of a training step.

    Args:
      layout: of the params tree.
      mesh: the devices.
      program: the lowered schedule.
      remat: what is kept for the backward; see `Config.remat`.
      batch: abstract values or arrays, leaves [M, B, ...].
      key: that of the step or its abstract value; None: without dropout.

    Attributes:
      terms: abstract values of the loss of one micro-batch.
      outputs, labels: abstract values of one micro-batch on one data rank.
      programs: the distinct stage programs; `program_ids[stage]` is the number of the one that a stage runs.
      store: the buffers of what forwards keep.
      codecs: per kind of value, how it travels.

    Raises:
      LayerError, LossError, DataError: the model does not fit itself or the batch.
    """

    def __init__(self, layout: Layout, mesh: Mesh, program: Program, remat: RematOption, batch: Batch, key: Key | None):
        module = layout.module
        self.layout, self.mesh, self.program = layout, mesh, program
        key_aval: Avals = None if key is None else aval(key)
        inputs, self.labels = (micro_batch_avals(tree, mesh) for tree in batch)
        self.num_micro_batches = jax.tree.leaves(batch[0])[0].shape[0]
        shapes = module.shapes(inputs, layout.layer_params, key=key_aval, mesh=mesh)
        self.stages = make_stages(layout, shapes)
        self.outputs: Avals = shapes[-1].outputs
        self.terms = module.loss_shapes(self.outputs, self.labels, mesh)
        cut = [stage.inputs for stage in self.stages[1:]]
        self.codecs = {Y: Codec(cut), DX: Codec([split_inexact(tree)[0] for tree in cut])}
        self.weights, self.store = Weights(layout, mesh), Store()
        self.programs: list[StageProgram] = []
        self.program_ids: list[int] = []
        with_axes(mesh, functools.partial(self._capture, mode(remat), key_aval))()

    def _capture(self, remat: Remat, key: Avals) -> tuple[()]:
        loss_fn = self.layout.module.loss_fn

        def captured(stage: Stage) -> StageProgram:
            return StageProgram(stage, self.weights, self.store, remat, loss_fn, self.labels, key)

        self.programs, self.program_ids = distinct(self.stages, captured)
        return ()

    def bytes_per_rank(self) -> dict[str, int]:
        """What a device holds during a step, in bytes, by category; each the largest need of any rank.

        "weights" are those it computes with, "gradients" the sums that are added up, "saved" what forwards keep for
        backwards, "messages" what has arrived and was not read yet.
        """
        held = jax.tree.leaves(self.weights.avals())
        sums = jax.tree.leaves(jax.eval_shape(self.weights.blank_gradients, self.weights.avals()))
        saved = self.store.avals(self.program.pools[SAVED])
        messages = [size * _bytes(self.codecs[value].spec) for value, size in self.program.inboxes.items()]
        return {"weights": _bytes(held), "gradients": _bytes(sums), "saved": _bytes(saved), "messages": sum(messages)}

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
