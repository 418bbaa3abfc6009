"""The earliest start times of rows of ops. The deadlock check, the ticks and the simulator all use this event loop."""

from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

from jaxpipe.schedules.op import Op, Rows

Cost: TypeAlias = int | float | Fraction


def earliest_starts(
    rows: Rows,
    needs: Callable[[Op], tuple[Op, ...]],
    *,
    duration: Callable[[Op], Cost] = lambda op: 1,
    delay: Callable[[Op, Op], Cost] = lambda source, op: 0,
) -> dict[Op, Cost]:
    """When each op can start at the earliest if every rank works through its row in order.

    An op starts when its rank is free and each `source` that it needs ended at least `delay(source, op)` ago. Idle cells
    are ignored, because idle time is a result here and not an input.

    Args:
      needs: the ops that have to end before an op.
      duration: how long an op takes, in any unit.
      delay: how long a value takes from one op to another, in the same unit.

    Returns:
      The start of each op, in the same unit. Ops that can never start, because of a deadlock, are missing.
    """
    queues = [[op for op in row if op is not None] for row in rows]
    done = [0] * len(queues)
    free: list[Cost] = [0] * len(queues)
    starts: dict[Op, Cost] = {}
    ends: dict[Op, Cost] = {}
    # Each rank runs as far as it can before the next rank is looked at. The order of the ranks cannot change a time,
    # because a start depends on ends only.
    progress = True
    while progress:
        progress = False
        for rank, queue in enumerate(queues):
            while done[rank] < len(queue):
                op = queue[done[rank]]
                sources = needs(op)
                if any(source not in ends for source in sources):
                    break
                start = max([free[rank], *(ends[source] + delay(source, op) for source in sources)])
                starts[op] = start
                ends[op] = free[rank] = start + duration(op)
                done[rank] += 1
                progress = True
    return starts
