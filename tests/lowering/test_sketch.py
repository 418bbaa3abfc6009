"""Programs without slots."""

import pytest

from jaxpipe import schedules
from jaxpipe.lowering.channels import clock
from jaxpipe.lowering.program import Cell
from jaxpipe.lowering.sketch import sketch


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_ops_lie_in_the_ticks_that_were_said(name):
    schedule = schedules.get(name, 3, 5)
    ticks = {op: 2 * tick for op, tick in clock(schedule).items()}  # with an idle tick behind each
    program = sketch(schedule, ticks)
    found = {
        (cell.kind, cell.stage, cell.micro_batch): (tick, rank)
        for tick, row in enumerate(program.cells)
        for rank, cell in enumerate(row)
        if cell != Cell()
    }
    assert found == {op: (tick, schedule.placement[op[1]]) for op, tick in ticks.items()}
    sent = [
        (tick, program.channels[channel].value, edge)
        for tick, row in enumerate(program.traffic)
        for channel, edge in row
    ]
    forward = [(tick, "y", (stage, stage + 1)) for (kind, stage, _), tick in ticks.items() if kind == "F" and stage < 2]
    backward = [(tick, "dx", (stage, stage - 1)) for (kind, stage, _), tick in ticks.items() if kind in "BI" and stage]
    assert sorted(sent) == sorted(forward + backward)
