"""Which schedules fit a model that has state: those in which the ops that change it run in micro-batch order."""

from collections.abc import Sequence

from jaxpipe.errors import ScheduleError
from jaxpipe.executor.tail import split_tail
from jaxpipe.layout.stages import Part, Stage
from jaxpipe.lowering.program import Program


def check_order(program: Program, stages: Sequence[Stage]) -> None:
    """Raises ScheduleError if a stage with state would change it in another order than a loop over micro-batches does.

    Forwards change the state of layers, but for those of the tail, which backwards run.
    """
    for number, stage in enumerate(stages):
        body, tail = split_tail(stage)
        for parts, kinds, what in ((body, "F", "forwards"), (tail, "BI", "backwards (which run the last layers)")):
            stateful = next((part for part in parts if _changes(part)), None)
            if stateful is None:
                continue
            cells = [cell for tick in program.cells for cell in tick if cell.stage == number and cell.kind in kinds]
            order = [cell.micro_batch for cell in cells]
            if order != sorted(order):
                raise ScheduleError(
                    f"This schedule runs the {what} of stage {number} in the order {order}, but {stateful.label} has "
                    "state, which every micro-batch changes: they have to come in the order 0, 1, 2, ... Use another "
                    "schedule, or layers without state."
                )


def _changes(part: Part) -> bool:
    return part.state is not None and any(part.state.changes)
