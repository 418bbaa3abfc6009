"""Forward only: the same loop with one kind of op, nothing saved, no gradients anywhere in the program.

The tail of the last stage (usually a norm and the projection to the vocabulary) and the loss can cost more than all other
layers of a stage together, and every rank would wait for the last one. Their weights are on every rank anyway, so where
only sums are wanted the last rank keeps what enters the tail for S ticks, deals the S micro-batches out, and all ranks run
tail and loss of one micro-batch each, at the same time:

    rank 0 | F3 F4 F5 F6 T0 F7 ...        S ticks, then one turn of T
    rank 1 | F2 F3 F4 F5 T1 F6 ...
    rank 2 | F1 F2 F3 F4 T2 F5 ...
    rank 3 | F0 F1 F2 F3 T3 F4 ...        F of the last rank: without tail and loss
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.errors import LossError
from jaxpipe.executor import loop, reduce, stage_program
from jaxpipe.executor.batch import batch_specs, micro_batch_avals, pick
from jaxpipe.executor.tally import Tally, loss_of
from jaxpipe.executor.wire import Codec
from jaxpipe.lowering.channels import FORWARD
from jaxpipe.lowering.program import Program
from jaxpipe.mesh import DATA, PIPE, data_size, manual_axes, pipe_size
from jaxpipe.model.layout import Layout
from jaxpipe.model.module import LayerShapes
from jaxpipe.model.shapes import describe
from jaxpipe.model.stages import Part, Stage, make_stages
from jaxpipe.types import MetricsFn, Params, Tree

P = PartitionSpec

REDUCTIONS = ("avg", "sum", None)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an evaluation computes; each distinct value is a program of its own.

    Attributes:
      outputs, loss, metrics: what is wanted.
      metrics_fn: more metrics than those of `loss_fn`.
      reduce_output: "avg", "sum", or None for one loss per micro-batch.
      broadcast: sums are on all ranks; otherwise on the last one only.
      raw: give the sums themselves, to be joined with those of other calls.
      spread: all ranks share the work of the tail and the loss; None decides.
    """

    outputs: bool = False
    loss: bool = True
    metrics: bool = False
    metrics_fn: MetricsFn | None = None
    reduce_output: str | None = "avg"
    broadcast: bool = True
    raw: bool = False
    spread: bool | None = None


def evaluate(
    layout: Layout,
    mesh: Mesh,
    program: Program,
    params: Params,
    inputs: Tree,
    labels: Tree,
    real: jax.Array | None,
    options: Options,
) -> dict[str, Any]:
    """One batch in evaluation mode; traceable.

    Args:
      inputs, labels: leaves [M, B, ...].
      real: bool [data ranks], whether the rows of a data rank count; None: all do.

    Returns:
      Of these what was asked for:
      "loss": a scalar or [M]; with `raw` sum and weight, [M] each.
      "metrics": their results by name; with `raw` what they were joined to.
      "outputs": leaves [S * M, B, ...], "rows": {name: [S * M, B, ...]} for metrics that keep rows; of both only the last
        M entries (those of the last rank) count.
      Without `broadcast`, loss and metrics have one value per rank along dim 0, of which only the last counts.
    """
    shapes = layout.module.shapes(
        micro_batch_avals(inputs, mesh), layout.layer_params, train=False, key=None, mesh=mesh
    )
    made = shapes[-1].outputs
    labels_aval = micro_batch_avals(labels, mesh)
    rows = jax.tree.leaves(micro_batch_avals(inputs, mesh))[0].shape[0]
    if options.loss:
        layout.module.loss_shapes(made, labels_aval, mesh)  # its errors say more than those of the trace below
    if options.outputs and not all(leaf.shape[:1] == (rows,) for leaf in jax.tree.leaves(made)):
        raise LossError(
            f"Outputs can be returned if their first dim is the rows of the micro-batch ({rows} on each data rank), but "
            f"the last layer returns {describe(made)}. Call without return_logits and with compute_loss."
        )
    tally = Tally(
        layout.module.loss_fn,
        made,
        labels_aval,
        rows=rows,
        num_micro_batches=jax.tree.leaves(inputs)[0].shape[0],
        loss=options.loss,
        metrics=options.metrics,
        metrics_fn=options.metrics_fn,
        by_rows=options.raw,
        mesh=mesh,
    )
    stages = make_stages(layout, shapes)
    stages, tail, tail_inputs = _cut_tail(stages, layout, shapes, options, tally)
    job = _Job(layout, mesh, program, stages, tail, tail_inputs, made, tally, options)
    per_rank = P(PIPE, DATA) if DATA in mesh.axis_names else P(PIPE)
    sums = P() if options.broadcast else P(PIPE)
    flags = P(DATA) if DATA in mesh.axis_names else P()
    return jax.shard_map(
        job.one_device,
        mesh=mesh,
        in_specs=(layout.specs, P(PIPE), flags, flags, batch_specs(inputs, mesh), batch_specs(labels, mesh)),
        out_specs={"loss": sums, "metrics": sums, "outputs": per_rank, "rows": per_rank},
        axis_names=manual_axes(mesh),
        check_vma=False,  # as in training: users' layers need not annotate what varies
    )(params, *_ranks(mesh), real, inputs, labels)


def _ranks(mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    return jnp.arange(pipe_size(mesh), dtype=jnp.int32), jnp.arange(data_size(mesh), dtype=jnp.int32)


def _cut_tail(
    stages: list[Stage], layout: Layout, shapes: list[LayerShapes], options: Options, tally: Tally
) -> tuple[list[Stage], tuple[Part, ...] | None, Tree]:
    """The stages without the tail, the tail, and its input; tail None: the last stage runs it."""
    body, tail = stage_program.split_tail(stages[-1])
    possible = len(stages) > 1 and options.broadcast and not options.outputs and not tally.keeps_rows
    wanted = options.spread
    if possible and wanted is None:
        wanted = bool(tail) and tally.num_micro_batches > 1 and _pays(layout, shapes, len(tail))
    if not (possible and wanted):
        return stages, None, None
    inputs = stages[-1].part_inputs[len(body)] if tail else stages[-1].outputs
    return [*stages[:-1], replace(stages[-1], parts=body, outputs=inputs)], tail, inputs


def _pays(layout: Layout, shapes: list[LayerShapes], tail: int) -> bool:
    """Whether sharing the last `tail` layers makes the slowest rank's work per micro-batch at least a tenth shorter.

    It does not where the cut has already given the last stage fewer layers to make room for them. A tenth, because the
    transfers that come with it are not counted.
    """
    flops = layout.module.flops(shapes)
    cuts = list(zip(layout.boundaries[:-1], layout.boundaries[1:], strict=True))
    shared = sum(flops[-tail:])
    alone = [sum(flops[start:stop]) for start, stop in cuts]
    return max(*alone[:-1], alone[-1] - shared) + shared / len(cuts) < 0.9 * max(alone)


@dataclass(frozen=True)
class _Job:
    """One evaluation, for one shape of batch; `one_device` runs inside `shard_map`."""

    layout: Layout
    mesh: Mesh
    program: Program
    stages: list[Stage]
    tail: tuple[Part, ...] | None
    tail_inputs: Tree
    made: Tree
    tally: Tally
    options: Options

    def one_device(
        self, params: Params, rank: jax.Array, data_rank: jax.Array, real: Any, inputs: Tree, labels: Tree
    ) -> dict[str, Any]:
        rank, data_rank, real = rank[0], data_rank[0], None if real is None else real[0]
        params = reduce.assemble(self.layout, params)
        codec = Codec([s.inputs for s in self.stages[1:]])
        num_stages, num_micro_batches = len(self.stages), self.tally.num_micro_batches
        known: dict[Any, int] = {}
        program_ids = [known.setdefault(stage.program_key(), len(known)) for stage in self.stages]

        def finish(state: Any, y: Tree, m: jax.Array) -> Any:
            sums = self.tally.add(state["sums"], m, y, pick(labels, m), real)
            if not self.options.outputs:
                return {"sums": sums}
            return {"sums": sums, "outputs": jax.tree.map(lambda kept, a: kept.at[m].set(a), state["outputs"], y)}

        def branch_of(kind: str, program_id: int) -> loop.Branch:
            assert kind == "F"
            stage = self.stages[program_ids.index(program_id)]

            def run_forward(state: Any, inbox: loop.Inbox, now: loop.Now) -> Any:
                m = now.micro_batch
                if stage.is_first:
                    x = pick(inputs, m)
                else:
                    x = codec.decode(loop.message(self.program, inbox, FORWARD, now), stage.inputs)
                y = stage_program.evaluate(stage.parts, params, x)
                if not stage.is_last:
                    return {}, {FORWARD: codec.encode(y)}
                if self.tail is None:
                    return finish(state, y, m), {}
                hand = jax.tree.map(lambda kept, a: kept.at[m % num_stages].set(a), state["hand"], y)
                return {"hand": hand}, {}

            if not stage.is_last:
                return run_forward, ()
            return run_forward, ("hand",) if self.tail is not None else tuple(name for name in state if name != "hand")

        def run_tail(turn: jax.Array, state: Any) -> Any:
            m = turn * num_stages + rank
            x = reduce.deal(state["hand"], self.mesh)

            def once(changed: Any, x: Tree, m: jax.Array) -> Any:
                return finish({**state, **changed}, stage_program.evaluate(self.tail or (), params, x), m)

            return {**state, **loop.run_if(m < num_micro_batches, once, {"sums": state["sums"]}, x, m)}

        state: dict[str, Any] = {"sums": self.tally.start()}
        if self.options.outputs:
            state["outputs"] = _blank(self.made, num_micro_batches)
        pause = None
        if self.tail is not None:
            state["hand"] = _blank(self.tail_inputs, num_stages)
            pause = loop.Pause(num_stages - 1, num_stages, run_tail)
        wires = loop.Wires(codec.spec, ())
        state = loop.run(self.program, rank, branch_of, program_ids, state, wires, pause=pause)

        axes = (PIPE, DATA) if self.options.broadcast else (DATA,)
        place = rank * data_size(self.mesh) + data_rank if self.options.broadcast else data_rank
        found = self._results(self.tally.reduced(state["sums"], place, self.mesh, *axes))
        if not self.options.broadcast:
            found = jax.tree.map(lambda a: a[None], found)
        return {**found, "outputs": state.get("outputs"), "rows": self.tally.kept_rows(state["sums"])}

    def _results(self, terms: dict[str, Any]) -> dict[str, Any]:
        found = {"loss": None, **terms}
        if self.options.raw:
            return found
        if found["loss"] is not None:
            found["loss"] = loss_of(found["loss"], self.options.reduce_output)
        found["metrics"] = {name: joined.finish() for name, joined in found["metrics"].items()}
        return found


def _blank(tree: Tree, count: int) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), tree)
