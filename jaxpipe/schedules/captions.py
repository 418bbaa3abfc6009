"""The words that all pictures of a timeline share, in text, in figures and in traces."""

from collections.abc import Mapping
from types import MappingProxyType

from jaxpipe.schedules.clock import Cost
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.simulate import Timeline
from jaxpipe.schedules.table import Schedule

KINDS: Mapping[str, str] = MappingProxyType(
    {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
)


def title(timeline: Timeline, name: str) -> str:
    """What is drawn, and the figures that matter."""
    table = timeline.schedule
    chunks = f" x {table.num_chunks} chunks" if table.num_chunks > 1 else ""
    sync = "" if timeline.sync == "none" else f" ({timeline.sync} sync)"
    return (
        f"{name + ': ' if name else ''}{table.num_ranks} ranks{chunks}, {table.num_micro_batches} micro-batches: "
        f"makespan {float(timeline.makespan):g}{sync}, bubble {float(timeline.bubble):g} = "
        f"{timeline.bubble_fraction:.1%}"
    )


def label(op: Op, table: Schedule) -> str:
    """An op as its cell, without the stage if the rank has no other one."""
    return str(op) if table.num_chunks > 1 else f"{op.kind}{op.micro_batch}"


def chunk_of(op: Op, table: Schedule) -> int:
    """Which of the stages of its rank an op belongs to, in the order of the stages."""
    return table.placement[: op.stage].count(table.placement[op.stage])


def amount(timeline: Timeline, value: Cost) -> str:
    """What a rank keeps: bytes with a decimal unit, or a number of micro-batches."""
    number = float(value)
    if timeline.memory is None:
        return f"{number:.3g}"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
        number /= 1000
    raise AssertionError("the last unit ends the loop")
