"""What `Engine.summary` prints: the model, the step, its stages, and the tables of `layers` and `memory`."""

import math
from collections.abc import Sequence

import jax

from jaxpipe.columns import columns, counted, listed, ranges, short
from jaxpipe.layout.layout import Layout
from jaxpipe.mesh import data_size
from jaxpipe.model.kinds import Kind
from jaxpipe.model.module import PipelineModule
from jaxpipe.pipeline import Pipeline
from jaxpipe.processes.crossing import where
from jaxpipe.schedules import Schedule
from jaxpipe.summary import layers, memory
from jaxpipe.summary.layers import placed
from jaxpipe.training.config import Config
from jaxpipe.training.loss_scale import describe as describe_scale
from jaxpipe.training.state import TrainState
from jaxpipe.types import Avals, Batch

RULES = "rules or annotations say so"  # why a param is cut over a further axis


def summarize(pipe: Pipeline, config: Config, state: TrainState) -> str:
    """Describes an engine, from shapes alone: nothing runs on a device, and nothing is said to other processes.

    Args:
      pipe: one that has checked an example.
      state: its arrays are not read.
    """
    layout, module, example = pipe.layout, pipe.module, pipe.example
    assert example is not None, "initialize checks an example"
    counts = [_count(params) for params in layout.layer_params]
    flops = module.costs.forward(
        module.shapes(example[0], layout.layer_params, mesh=pipe.mesh, precision=pipe.precision)
    )
    lines = [
        *_head(pipe, config, sum(counts), example),
        "",
        *columns(_stages(layout, counts, flops), left={0, 1, 2, 3} if placed(layout) else {0, 1, 2}),
        "",
        *columns(layers.table(layout, counts, flops), left={0, 1, 2, 3, 6, 7} if placed(layout) else {0, 1, 2, 5, 6}),
    ]
    lines.append("FLOPs: of the forward of one micro-batch on all data ranks, as XLA counts them before it optimizes.")
    if layout.num_ranks > 1 and layout.shared:
        lines.append(
            "own rank: stored in equal pieces on all ranks, and brought to the one that uses it for the time of a step."
        )
    if layout.cuts_data:
        lines.append("zero_stage 1: cut over the data ranks, too, and gathered on all of them for the time of a step.")
    plan = memory.planned(pipe, example)
    if plan is not None and plan.whole_in_i:
        lines.append(
            f"{listed(plan.whole_in_i)}: the gradients of their weights are made with that of their input, in I, and add "
            "nothing to W."
        )
    return "\n".join([*lines, "", *columns(memory.table(pipe, state, plan), left={0})])


def _head(pipe: Pipeline, config: Config, num_params: int, example: Batch) -> list[str]:
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(pipe.layout.shapes())})
    schedule = "a table of your own" if isinstance(config.schedule, Schedule) else config.schedule
    remat = getattr(config.remat, "__name__", "a policy") if callable(config.remat) else config.remat
    size = f"{counted(pipe.module.num_layers, 'layer')} in {counted(pipe.num_stages, 'stage')}"
    if placed(pipe.layout):
        size += f" on {counted(pipe.layout.num_ranks, 'rank')}"
    rows, ranks = jax.tree.leaves(example[0])[0].shape[0], data_size(pipe.mesh)
    each = f" ({rows // ranks:,} on each data rank)" if ranks > 1 else ""
    step = f"{counted(config.num_micro_batches, 'micro-batch', 'micro-batches')} of {counted(rows, 'row')}{each}"
    first, *more = where(pipe.mesh)
    brings = "each process yields its own rows" if config.local_rows else "every process yields whole micro-batches"
    data = [f"data   {brings}"] if more else []
    return [
        f"model  {size}, {counted(num_params, 'parameter')} ({' '.join(dtypes)})".replace(" ()", ""),
        f"step   {step}, schedule {schedule}, remat {remat}",
        *_trained(pipe, num_params),
        f"mesh   {first}",
        *(f"       {line}" for line in more),
        *data,
        *_precision(pipe, config),
    ]


def _trained(pipe: Pipeline, num_params: int) -> list[str]:
    """How much of the model is trained; nothing if all of it is."""
    layout = pipe.layout
    if not layout.frozen.any:
        return []
    pairs = zip(layout.layer_params, layout.frozen.layers, strict=True)
    frozen = [a for held, said in pairs for a, f in zip(jax.tree.leaves(held), jax.tree.leaves(said), strict=True) if f]
    count, size = _count(frozen), sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in frozen)
    trained = counted(num_params - count, "parameter")
    return [f"train  {trained} of {num_params:,}; {count:,} are frozen, {short(size, 'B')} in all"]


def _precision(pipe: Pipeline, config: Config) -> list[str]:
    """What a step computes in, and how the loss is scaled; nothing if neither is set."""
    told: list[str] = []
    if config.compute_dtype is not None:
        told.append(f"computes in {config.compute_dtype}, adds up gradients in float32")
        stored, computed = (sum(map(_count, held)) for held in (pipe.layout.layer_params, _uncast(pipe)))
        if config.float32_params is not None:
            told[0] += f"; {counted(computed, 'parameter')} of {stored:,} not cast ({config.float32_params})"
    if config.loss_scale is not None:
        told.append(f"loss scale {describe_scale(config.loss_scale)}")
    elif config.compute_dtype == "float16":
        told.append("no loss scale: gradients below 6e-8 vanish")
    return [f"dtype  {'; '.join(told)}"] if told else []


def _uncast(pipe: Pipeline) -> list[list[jax.ShapeDtypeStruct]]:
    pairs = zip(pipe.layout.layer_params, pipe.layout.computed_params, strict=True)
    return [
        [a for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(computed), strict=True) if a.dtype == b.dtype]
        for stored, computed in pairs
    ]


# --------------------------------------------------------------------------------------------------------------- stages


def _stages(layout: Layout, counts: Sequence[int], flops: Sequence[int]) -> list[list[str]]:
    on = ["rank"] if placed(layout) else []
    rows = [["stage", *on, "layers", "kinds", "parameters", "", "FLOPs", ""]]

    def numbers(of: Sequence[int], total: int, text: str) -> list[str]:
        return [text, f"{100 * sum(of) / total:.0f} %" if total else ""]

    for stage, (first, end) in enumerate(zip(layout.boundaries, layout.boundaries[1:], strict=False)):
        mine = slice(first, end)
        rows.append(
            [
                str(stage),
                *(str(layout.placement[stage]) for _ in on),
                ranges(range(first, end)),
                _names(layout.module, first, end),
                *numbers(counts[mine], sum(counts), f"{sum(counts[mine]):,}"),
                *numbers(flops[mine], sum(flops), short(sum(flops[mine]))),
            ]
        )
    return [*rows, ["total", *("" for _ in on), str(len(counts)), "", f"{sum(counts):,}", "", short(sum(flops)), ""]]


def _names(module: PipelineModule, first: int, end: int) -> str:
    """The layers of a stage: `Embedding, 3 x Block`."""
    found: dict[tuple[str, Kind], int] = {}
    for index in range(first, end):
        layer = module.layers[index]
        name = layer.name if module.owners[index] == index else f"{layer.name} (tied)"
        found[name, layer.kind] = found.get((name, layer.kind), 0) + 1
    return listed([name if count == 1 else f"{count} x {name}" for (name, _), count in found.items()])


def _count(params: Avals) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
