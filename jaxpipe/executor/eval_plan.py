"""What a compiled evaluation will do, planned on shapes alone, outside of the program."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from jaxpipe.errors import LossError
from jaxpipe.executor.batch import micro_batch_avals
from jaxpipe.executor.options import Options
from jaxpipe.executor.plan import distinct
from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.tail import split_tail
from jaxpipe.executor.tally import Tally
from jaxpipe.executor.unit import repeated
from jaxpipe.executor.weights import Weights
from jaxpipe.executor.wire import Codec
from jaxpipe.lowering.program import Program
from jaxpipe.model.abstract import with_axes
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.layout import Layout
from jaxpipe.model.module import LayerShapes
from jaxpipe.model.shapes import describe
from jaxpipe.model.stages import Part, Stage, make_stages
from jaxpipe.types import Avals, Batch, Params, Tree


@dataclass(frozen=True)
class EvalStage:
    """A stage in evaluation mode: `run(held, x) -> y`, captured. Nothing is kept."""

    stage: Stage
    run: Captured


@dataclass(frozen=True)
class SharedTail:
    """A tail that all ranks share: `run(held, x) -> y`, and the abstract values of x."""

    inputs: Avals
    run: Captured


class EvalPlan:
    """The plan of an evaluation.

    Args:
      layout: of the params tree.
      mesh: the devices.
      program: the lowered forward-only schedule.
      batch: abstract values or arrays, leaves [M, B, ...].
      options: what is wanted.

    Attributes:
      outputs: abstract values of what the last layer returns for one micro-batch on one data rank.
      tally: adds up loss and metrics.
      programs: the distinct stages; `program_ids[stage]` is the number of the one that a stage runs.
      tail: what all ranks share of the last stage, or None if the last rank runs it all.
      codec: how outputs travel.

    Raises:
      LayerError, LossError, DataError: the model does not fit itself, the batch, or what is wanted.
    """

    def __init__(self, layout: Layout, mesh: Mesh, program: Program, batch: Batch, options: Options):
        module = layout.module
        self.layout, self.mesh, self.program, self.options = layout, mesh, program, options
        inputs, labels = (micro_batch_avals(tree, mesh) for tree in batch)
        self.num_micro_batches = jax.tree.leaves(batch[0])[0].shape[0]
        shapes = module.shapes(inputs, layout.layer_params, train=False, key=None, mesh=mesh)
        self.outputs: Avals = shapes[-1].outputs
        rows = jax.tree.leaves(inputs)[0].shape[0]
        if options.loss:
            module.loss_shapes(self.outputs, labels, mesh)  # its errors say more than those of the tally
        if options.outputs and not all(leaf.shape[:1] == (rows,) for leaf in jax.tree.leaves(self.outputs)):
            raise LossError(
                f"Outputs can be returned if their first dim is the rows of the micro-batch ({rows} on each data rank), "
                f"but the last layer returns {describe(self.outputs)}. Call without return_logits and with compute_loss."
            )
        self.tally = Tally(
            module.loss_fn,
            options,
            self.outputs,
            labels,
            rows=rows,
            num_micro_batches=self.num_micro_batches,
            mesh=mesh,
        )
        self.stages = make_stages(layout, shapes)
        body, tail = split_tail(self.stages[-1])
        shared = self._shares(shapes, len(tail))
        inner = self.stages[-1].part_inputs[len(body)] if tail else self.stages[-1].outputs
        if shared:
            self.stages[-1] = replace(self.stages[-1], parts=body, outputs=inner)
        self.codec = Codec([stage.inputs for stage in self.stages[1:]])
        self.weights = Weights(layout, mesh)

        self.programs: list[EvalStage] = []
        self.program_ids: list[int] = []
        self.tail: SharedTail | None = None

        def captured() -> tuple[()]:
            self.programs, self.program_ids = distinct(
                self.stages, lambda stage: EvalStage(stage, self._capture(stage.parts, stage.inputs))
            )
            self.tail = SharedTail(inner, self._capture(tail, inner)) if shared else None
            return ()

        with_axes(mesh, captured)()

    def _capture(self, parts: Sequence[Part], inputs: Avals) -> Captured:
        def run(held: Params, x: Tree) -> Tree:
            for part in parts:
                one = replace(part, count=1)

                def step(x: Tree, repeat: Repeat, one: Part = one) -> Tree:
                    [params] = self.weights.take(held, [one], repeat)
                    return one.apply(params, x, None)

                x = repeated(step, x, part.count)
            return x

        return capture(run, self.weights.avals(), inputs)

    def _shares(self, shapes: list[LayerShapes], tail: int) -> bool:
        """Whether all ranks share the work of the last `tail` layers and the loss."""
        options = self.options
        possible = len(self.stages) > 1 and options.broadcast and not options.outputs and not self.tally.keeps_rows
        if not possible or options.spread is not None:
            return possible and bool(options.spread)
        return tail > 0 and self.num_micro_batches > 1 and self._sharing_pays(shapes, tail)

    def _sharing_pays(self, shapes: list[LayerShapes], tail: int) -> bool:
        """Whether sharing the last `tail` layers makes the slowest rank's work per micro-batch at least a tenth shorter.

        It does not where the cut has already given the last stage fewer layers to make room for them. A tenth, because the
        transfers that come with it are not counted.
        """
        flops = self.layout.module.flops(shapes)
        cuts = list(zip(self.layout.boundaries[:-1], self.layout.boundaries[1:], strict=True))
        shared = sum(flops[-tail:])
        alone = [sum(flops[start:stop]) for start, stop in cuts]
        return max(*alone[:-1], alone[-1] - shared) + shared / len(cuts) < 0.9 * max(alone)
