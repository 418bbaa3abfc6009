"""What a compiled evaluation will do, planned on shapes alone, outside of the program."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError, LossError
from jaxpipe.executor import beside
from jaxpipe.executor.batch import micro_batch_avals
from jaxpipe.executor.begin import AT_ZERO, Begin, begins
from jaxpipe.executor.options import Options
from jaxpipe.executor.plan import distinct
from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.states import States
from jaxpipe.executor.tail import split_tail
from jaxpipe.executor.tally import Tally
from jaxpipe.executor.unit import repeated
from jaxpipe.executor.weights import Weights
from jaxpipe.executor.wire import Codec
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.stages import Part, Stage, make_stages
from jaxpipe.layout.state_layout import state_layout
from jaxpipe.lowering.program import Program
from jaxpipe.model.abstract import with_axes
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.context import Aux
from jaxpipe.model.reports import check_names, named_aux
from jaxpipe.model.shapes import describe
from jaxpipe.model.tracing import LayerShapes
from jaxpipe.processes.group import Group
from jaxpipe.types import Avals, Batch, Params, Tree


@dataclass(frozen=True)
class EvalStage:
    """A stage in evaluation mode: `run(held, stage, beside, x) -> (y, beside)`, captured. Nothing is kept.

    `stage` is the number of the stage, int32 [], because several may run one program.
    `beside` is what a rank carries; see `executor/beside.py`. No state comes back: an evaluation changes none.
    """

    stage: Stage
    run: Captured


@dataclass(frozen=True)
class SharedTail:
    """A tail that all ranks share: `run(held, stage, beside, x) -> (y, beside)`, and the abstract values of x."""

    inputs: Avals
    run: Captured


def rows_everywhere(mesh: Mesh, options: Options) -> bool:
    """Whether metrics with a value per row come to all devices, as loss and other metrics do.

    With one process they stay on the last rank, where it can read them.
    """
    return options.broadcast and Group.of(mesh).several


class EvalPlan:
    """The plan of an evaluation.

    Args:
      layout: of the params tree.
      mesh: the devices.
      program: the lowered forward-only schedule.
      batch: abstract values or arrays, leaves [M, B, ...].
      options: what is wanted.

    Attributes:
      outputs: abstract values of what the loss and the user get for one micro-batch on one data rank.
      tally: adds up loss and metrics.
      states: the state of the layers, which is read only.
      beside: abstract values of what each layer gives beside its output; empty if nobody wants to know.
      programs: the distinct stages; `program_ids[stage]` is the number of the one that a stage runs.
      tail: what all ranks share of the last stage, or None if the last rank runs it all.
      codec: how outputs travel.
      rows_everywhere: whether values per row come to all devices; see `rows_everywhere`.

    Raises:
      LayerError, LossError, DataError, ConfigError: the model does not fit itself, the batch, or what is wanted.
    """

    def __init__(self, layout: Layout, mesh: Mesh, program: Program, batch: Batch, options: Options):
        module = layout.module
        self.layout, self.mesh, self.program, self.options = layout, mesh, program, options
        inputs, labels = (micro_batch_avals(tree, mesh) for tree in batch)
        self.num_micro_batches = jax.tree.leaves(batch[0])[0].shape[0]
        states = None if layout.states is None else layout.states.layer_params
        shapes = module.shapes(
            inputs, layout.layer_params, states, train=False, key=None, mesh=mesh, precision=layout.precision
        )
        self.outputs: Avals = layout.precision.outputs(shapes[-1].outputs)
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
        # Evaluations look at what layers give where metrics are asked for, and only then.
        self.beside = [layer.aux for layer in shapes] if options.metrics else []
        if options.metrics:
            check_names(named_aux(module.label, shapes), self.tally.rules)
            if options.outputs and not options.loss and not any(aux.losses or aux.metrics for aux in self.beside):
                raise ConfigError(
                    "return_metrics=True needs compute_loss=True here: no layer gives extra losses or metrics "
                    "(jaxpipe.LayerOut), and those of loss_fn come with the loss."
                )
        self.stages = make_stages(layout, shapes)
        body, tail = split_tail(self.stages[-1])
        shared = self._shares(shapes, len(tail))
        inner = self.stages[-1].part_inputs[len(body)] if tail else self.stages[-1].outputs
        if shared:
            self.stages[-1] = replace(self.stages[-1], parts=body, outputs=inner)
        self.codec = Codec([stage.inputs for stage in self.stages[1:]])
        # All ranks run a shared tail, so they all need its weights; in every other program one rank has them.
        needed = {part.address for part in tail if part.address is not None} if shared else ()
        self.weights = Weights(layout, mesh, everywhere=needed)
        self.states = States(state_layout(layout, shapes), mesh, self.stages)
        self.rows_everywhere = rows_everywhere(mesh, options)

        self.programs: list[EvalStage] = []
        self.program_ids: list[int] = []
        self.tail: SharedTail | None = None

        def captured() -> tuple[()]:
            begin = begins(self.stages)

            def one(stage: Stage) -> EvalStage:
                return EvalStage(stage, self._capture(stage.parts, stage.inputs, begin[stage.program_key()]))

            self.programs, self.program_ids = distinct(self.stages, one)
            self.tail = SharedTail(inner, self._capture(tail, inner)) if shared else None
            return ()

        with_axes(mesh, captured)()

    def _capture(self, parts: Sequence[Part], inputs: Avals, begin: Begin = AT_ZERO) -> Captured:
        def run(held: Params, stage: jax.Array, carried: Aux, x: Tree) -> tuple[Tree, Aux]:
            sums = carried._replace(state={})
            for part in begin.placed(parts, stage):
                one = replace(part, count=1)

                def step(carry: tuple[Tree, Aux], repeat: Repeat, one: Part = one) -> tuple[Tree, Aux]:
                    x, sums = carry
                    [params] = self.weights.take(held, [one], repeat)
                    [context] = beside.contexts([one], carried, None, None, repeat)
                    y, found = one.apply(params, x, context)
                    return y, beside.record(sums, [one], repeat, [found._replace(state={})])

                x, sums = repeated(step, (x, sums), part.count)
            return x, sums

        carried = jax.eval_shape(self.start)._replace(state=self.states.avals())
        return capture(run, self.weights.avals(), jax.ShapeDtypeStruct((), jnp.int32), carried, inputs)

    def start(self) -> Aux:
        """What a rank carries beside before its first tick, but for the state of layers, which it does not carry."""
        return beside.start(self.beside, {})

    def _shares(self, shapes: list[LayerShapes], tail: int) -> bool:
        """Whether all ranks share the work of the last `tail` layers and the loss."""
        options = self.options
        possible = (
            self.layout.num_ranks > 1
            and self._comes_in_turns()
            and options.broadcast
            and not options.outputs
            and not self.tally.keeps_rows
        )
        if not possible or options.spread is not None:
            return possible and bool(options.spread)
        return tail > 0 and self.num_micro_batches > 1 and self._sharing_pays(shapes, tail)

    def _comes_in_turns(self) -> bool:
        """Whether the rank of the last stage has run S more micro-batches up to the tail after each turn, S the ranks.

        With one stage per rank, a turn has S ticks. Where stages go round the ranks v times, it has v S ticks, if no group
        of micro-batches is larger than S (`schedules/forward_only.py`). Elsewhere they come as they come.
        """
        layout, ranks, count = self.layout, self.layout.num_ranks, self.num_micro_batches
        if layout.num_stages == ranks:
            return True
        loop = tuple(stage % ranks for stage in range(layout.num_stages))
        return layout.placement == loop and layout.num_stages % ranks == 0 and (count % ranks == 0 or count < ranks)

    def _sharing_pays(self, shapes: list[LayerShapes], tail: int) -> bool:
        """Whether sharing the last `tail` layers makes the slowest rank's work per micro-batch at least a tenth shorter.

        It does not where the cut has already given the last stage fewer layers to make room for them. A tenth, because the
        transfers that come with it are not counted.
        """
        flops = self.layout.module.costs.forward(shapes)
        layout, last = self.layout, self.layout.placement[-1]
        shared = sum(flops[-tail:])
        alone = [0] * layout.num_ranks
        for stage, rank in enumerate(layout.placement):
            alone[rank] += sum(flops[layout.boundaries[stage] : layout.boundaries[stage + 1]])
        others = [work - shared * (rank == last) for rank, work in enumerate(alone)]
        return max(others) + shared / layout.num_ranks < 0.9 * max(alone)
