"""`plan`: which mesh, schedule and settings train a model fastest on some chips, from shapes alone."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from jaxpipe.checks import count, show
from jaxpipe.columns import short
from jaxpipe.errors import ConfigError, LayerError
from jaxpipe.hardware.chips import as_chip
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.precision import Precision
from jaxpipe.planner.cost import MODEL, Costs
from jaxpipe.planner.measured import mesh_of, source
from jaxpipe.planner.report import Plan, Row
from jaxpipe.planner.search import Found, Search
from jaxpipe.planner.step import Steps
from jaxpipe.planner.trace import Model
from jaxpipe.training.config import Config
from jaxpipe.types import Batch

Measure = Literal["time", "tpu"] | None
_SHOWN, _TOO_LARGE = 8, 3  # how many rows a plan has: of what fits, and of what does not


def plan(
    module: PipelineModule,
    example: Batch,
    *,
    chips: int,
    chip: str | Mapping[str, float] = "v5p",
    global_batch: int,
    memory: float | None = None,
    measure: Measure = None,
) -> Plan:
    """Searches meshes, schedules and settings for the fastest step.

    Nothing is computed but shapes, so a model of any size can be planned on a machine without accelerators. What is
    predicted is a bound of what hardware can do: with `measure=None` every product runs at the published peak, and every
    byte at the published bandwidth. What counts is how the rows compare.

    The optimizer is counted as Adam, with float32 weights and moments; a step computes in bfloat16.

    Args:
      module: the model. Where it has rules that name the axis "model", that axis is searched, too.
      example: (inputs, labels) of any number of rows, arrays or ShapeDtypeStruct [B, ...]; costs are scaled to others.
      chips: how many chips there are; a mesh may use fewer.
      chip: a name ("v4", "v5e", "v5p", "v6e", "a100", "h100", "h200"), or a dict of "peak_flops", "memory", "bandwidth" and
        "link", in FLOP/s, bytes, and bytes per second.
      global_batch: rows of a step, over all micro-batches and data ranks.
      memory: bytes of a chip that may be used; by default all that it has.
      measure: where the seconds of layers come from. None: from operations and bytes, at the speeds that are published.
        "time": each distinct layer is timed on the first device of this process, which must be one of `chip`'s kind for
        the result to mean anything. "tpu": from the cycles that the TPU compiler estimates for each distinct layer.

    Returns:
      A `Plan`: `print` shows it, `.best` is the fastest way that fits, with a `Config`.

    Raises:
      ConfigError: a chip is not known (the message lists those that are), or a number is out of range.
      HardwareError: measure="tpu" without the TPU compiler.
      DataError, LayerError, LossError: the model and the example do not fit each other.
    """
    return plan_for(module, example, Config(compute_dtype="bfloat16"), chips, chip, global_batch, memory, measure)


def plan_for(
    module: PipelineModule,
    example: Batch,
    config: Config,
    chips: int,
    chip: str | Mapping[str, float] = "v5p",
    global_batch: int = 1,
    memory: float | None = None,
    measure: Measure = None,
) -> Plan:
    """The same for a config whose other settings, such as the dtype of a step, the configs of the plan keep."""
    if not isinstance(module, PipelineModule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise LayerError(f"plan({show(module)}): expected a jaxpipe.PipelineModule.")
    if not isinstance(example, tuple) or len(example) != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"example={show(example)}: it is a pair (inputs, labels) of some rows, as for jaxpipe.initialize."
        )
    chips, global_batch = count("chips", chips), count("global_batch", global_batch)
    kind = as_chip(chip, memory)
    if measure not in (None, "time", "tpu"):
        raise ConfigError(f'measure={show(measure)} must be None, "time" or "tpu".')
    axes = dict.fromkeys(sorted(module.axes | {MODEL}), 1)
    model = Model(
        module, example, mesh_of(measure, kind, axes), Precision.of(config.compute_dtype, config.float32_params)
    )
    costs = Costs(model, kind, None if measure is None else source(measure, model, kind))
    search = Search(Steps(costs), chips, global_batch)
    found = search.best(_SHOWN)
    fastest = found[0].step.seconds if found else float("inf")
    others = search.faster_that_do_not_fit(_TOO_LARGE, fastest) if found else search.nearest(_SHOWN)
    rows = [_row(one, search, config) for one in [*found, *others]]
    least = search.smallest()
    smallest = None if least is None else _row(least, search, config)
    return Plan(rows, smallest, kind, chips, global_batch, costs.source, () if found else _help(search, others))


def _row(found: Found, search: Search, config: Config) -> Row:
    candidate, step = found
    mesh = candidate.mesh
    shape = {"pipe": mesh.pipe, "data": mesh.data} | ({MODEL: mesh.model} if mesh.model > 1 else {})
    settings: dict[str, Any] = {
        "num_micro_batches": candidate.micro_batches,
        "schedule": candidate.schedule,
        "remat": candidate.remat,
        "zero_stage": candidate.zero,
    }
    if candidate.chunks > 1 and any(field.name == "num_chunks" for field in fields(Config)):
        settings["num_chunks"] = candidate.chunks
    useful = search.steps.cutter.useful_flops(candidate.rows) * search.global_batch / candidate.rows
    return Row(
        config=replace(config, **settings),
        mesh_shape=shape,
        rows=candidate.rows,
        partition=step.boundaries,
        step_seconds=step.seconds,
        utilisation=useful / (step.seconds * mesh.size * search.costs.chip.peak_flops),
        bubble=step.bubble,
        bytes_per_chip=round(step.total_bytes),
        bytes={name: round(size) for name, size in step.bytes.items()},
        seconds=dict(step.parts),
        fits=step.total_bytes <= search.memory,
    )


def _help(search: Search, nearest: list[Found]) -> list[str]:
    """What would help where nothing fits."""
    if not nearest:
        return []
    step, module = nearest[0].step, search.costs.model.module
    most = max(step.bytes, key=lambda name: step.bytes[name])
    found = [f"Most of what comes nearest is {most}: {short(step.bytes[most], 'B')} of {short(step.total_bytes, 'B')}."]
    if MODEL not in module.axis_rules.axes:
        found.append(
            'The module has no rules for an axis "model" (PipelineModule(sharding=...)), which would cut single layers.'
        )
    if nearest[0].candidate.mesh.pipe == search.costs.num_layers:
        found.append("Each rank has one layer already: layers that are smaller could be cut over more ranks.")
    if most == "work":
        found.append("Layers that make less at once would help, such as attention that does not keep all scores.")
    return found
