"""What a rank holds from op to op: micro-batches between F and their backward, and what waits between I and W."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from jaxpipe.schedules.clock import Cost
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


class Holding(NamedTuple):
    """How much a micro-batch weighs, per stage, in any unit.

    Attributes:
      kept: from the start of F to the end of B or I. A forward-only table drops it at the end of F.
      pending: from the start of I to the end of W. None: what F kept stays until then, and nothing is added.
    """

    kept: Sequence[Cost]
    pending: Sequence[Cost] | None = None


Change: TypeAlias = tuple[Op, Cost, Cost]  # (op, what comes when it starts, what comes when it ends)


def changes(schedule: Schedule, rank: int, holding: Holding) -> list[Change]:
    """How what a rank holds changes, op by op. What goes is negative."""
    found: list[Change] = []
    for op in schedule.rows[rank]:
        if op is not None:
            kept = holding.kept[op.stage]
            # What follows from None: as if all of it were pending, and nothing kept from I on.
            pending = kept if holding.pending is None else holding.pending[op.stage]
            begins: Cost = 0
            ends: Cost = 0
            if op.kind == "F":
                begins, ends = kept, -kept if schedule.forward_only else 0
            elif op.kind == "B":
                ends = -kept
            elif op.kind == "I" and holding.pending is not None:
                begins, ends = pending, -kept
            elif op.kind == "W":
                ends = -pending
            found.append((op, begins, ends))
    return found


def peak(schedule: Schedule, rank: int, holding: Holding) -> Cost:
    """The most that a rank holds at once."""
    held: Cost = 0
    most: Cost = 0
    for _, begins, ends in changes(schedule, rank, holding):
        held += begins
        most = max(most, held)
        held += ends
    return most


def curve(
    schedule: Schedule, rank: int, holding: Holding, start: Callable[[Op], Cost], end: Callable[[Op], Cost]
) -> list[tuple[Cost, Cost]]:
    """Steps (time, amount): from that time on the rank holds so much. The first is at time 0."""
    steps: list[tuple[Cost, Cost]] = [(0, 0)]
    held: Cost = 0
    for op, begins, ends in changes(schedule, rank, holding):
        for time, change in ((start(op), begins), (end(op), ends)):
            if change:
                held += change
                if time == steps[-1][0]:
                    # Op by op: what an op gives back at its end is gone when the next one starts at that time.
                    steps[-1] = (time, held)
                else:
                    steps.append((time, held))
    return steps
