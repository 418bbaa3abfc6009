"""Walking through ticks, against makespans that are known."""

import pytest

from jaxpipe import schedules
from jaxpipe.hardware.steptime import runs, ticks
from jaxpipe.hardware.structure import Op
from jaxpipe.lowering.lower import lower


def op_of(cell):
    return Op(cell.kind, cell.stage)


def costs(stages, forward, backward):
    return {Op("F", s): forward for s in range(stages)} | {Op("B", s): backward for s in range(stages)}


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "eager_1f1b"])
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 3)])
def test_never_shorter_than_without_waiting_and_never_longer_than_a_barrier(name, forward, backward):
    table = schedules.get(name, 4, 8)
    found = ticks(lower(table), op_of, costs(4, forward, backward))
    least, most = (
        schedules.simulate(table, forward=forward, backward_weight=backward - 1, sync=sync).makespan
        for sync in ("none", "global")
    )
    assert least <= found.total <= most
    assert found.busy == (8 * (forward + backward),) * 4


def test_one_rank_waits_for_nobody():
    found = ticks(lower(schedules.one_f_one_b(1, 5)), op_of, costs(1, 2, 3), overhead=0.5, permute=100)
    assert (found.total, found.busy) == (5 * (2 + 3) + 10 * 0.5, (25,))


def test_overhead_and_transfers_come_on_top():
    program = lower(schedules.one_f_one_b(2, 4))
    plain = ticks(program, op_of, costs(2, 1, 1)).total
    assert plain == 2 * (4 + 1)
    assert ticks(program, op_of, costs(2, 1, 1), overhead=0.25).total == plain + 0.25 * program.num_ticks
    assert ticks(program, op_of, costs(2, 1, 1), permute=0.25).total > plain


def test_a_slow_stage_makes_the_others_wait():
    slow = costs(4, 1, 2) | {Op("B", 2): 5}
    found = ticks(lower(schedules.one_f_one_b(4, 8)), op_of, slow)
    assert found.busy == (24, 24, 48, 24) and found.total >= 48 + 3


def test_how_often_ranks_run_what():
    assert runs(lower(schedules.one_f_one_b(2, 3)), op_of) == [
        {Op("F", 0): 3, Op("B", 0): 3},
        {Op("F", 1): 3, Op("B", 1): 3},
    ]
