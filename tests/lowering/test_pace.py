"""The time of a program, against makespans that are known."""

import pytest

from jaxpipe import schedules
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.pace import pace


def test_what_arrives_late_is_not_waited_for_before():
    """In zero bubble on two ranks, rank 0 begins W while rank 1 still runs I."""
    program = lower(schedules.zero_bubble(2, 8))
    (loop,) = program.loops
    assert loop.period == 4, "the ticks of W send nothing"
    costs = {"F": 1, "I": 2, "W": 1.5}
    free = schedules.simulate(program.schedule, *costs.values()).makespan
    assert pace(program, lambda cell: costs[cell.kind]).total == pytest.approx(free)


@pytest.mark.parametrize("costs", [(1, 1, 1), (0.9, 1, 0.8), (1, 2.3, 1.2), (1, 1, 2)])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (4, 4), (4, 8), (4, 13), (8, 16)])
def test_zero_bubble_waits_for_nothing_but_its_inputs(ranks, micro_batches, costs):
    table = schedules.zero_bubble(ranks, micro_batches)
    cost = dict(zip("FIW", costs, strict=True))
    found = pace(lower(table), lambda cell: cost[cell.kind])
    assert found.total == pytest.approx(float(schedules.simulate(table, *costs).makespan))
    assert found.busy == pytest.approx((micro_batches * sum(costs),) * ranks)
