"""What a program says about itself."""

from hypothesis import given

from jaxpipe import schedules
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import IDLE
from tests.lowering.programs import random_schedules


def test_a_program_shows_itself():
    text = str(lower(schedules.one_f_one_b(4, 3)))
    assert "phase 0: ops B F; permutes forward 0>1 2>3, backward 1>0 3>2" in text
    assert "rank 3 | .    .    .    F0/0 B0/0 F1/0 B1/0 F2/0 B2/0" in text


def test_a_program_for_one_rank_without_pools_shows_itself():
    text = str(lower(schedules.forward_only(1, 2)))
    assert "1 ranks x 2 micro-batches, 2 ticks; slots: 0 saved, 0 forward, 0 backward" in text
    assert "phase 0: ops F; permutes none" in text and "rank 0 | F0 F1" in text


@given(random_schedules())
def test_the_phases_of_the_loops_cover_every_op_and_every_edge_with_traffic(schedule):
    program = lower(schedule)
    found = [
        cell for loop in program.loops for phase in range(loop.period) for _, cell in program.phase_cells(loop, phase)
    ]
    wanted = [cell for row in program.cells for cell in row if cell.kind != IDLE]
    assert sorted(found) == sorted(wanted)
    for loop in program.loops:
        for phase in range(loop.period):
            for number in range(len(program.channels)):
                carried = {e for t in loop.phase_ticks(phase) for n, e in program.traffic[t] if n == number}
                assert program.phase_edges(loop, phase, number) == tuple(sorted(carried))
