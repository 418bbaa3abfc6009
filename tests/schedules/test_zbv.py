"""ZBV: what its docstring claims. Bubble and memory for many counts: contracts/test_schedule_bounds.py."""

from fractions import Fraction

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import simulate, zbv
from tests.schedules.claims import COSTS, check_counts_are_checked, check_picture


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 4), (2, 3), (4, 8), (3, 5), (8, 16)])
def test_bubble_memory_and_barriers(p, m):
    table = zbv(2 * p, m)
    timeline = simulate(table, **{**COSTS, "forward": 1})
    assert timeline.bubble == (p - 1) * COSTS["backward_input"] / 2 and timeline.peak_live == (min(m, p),) * p
    assert table.ticks == table.rows and table.placement == (*range(p), *reversed(range(p)))
    assert simulate(table).makespan == simulate(table, sync="global").makespan, "every op takes one tick"
    assert all(op.kind != "B" for row in table.rows for op in row if op)


@pytest.mark.parametrize(
    ("p", "m", "bubble"),
    [(4, 1, "11/2"), (4, 4, "3/2"), (4, 5, "2"), (8, 4, "15/2"), (8, 8, "7/2"), (8, 9, "5"), (8, 12, "7/2")],
)
def test_few_micro_batches(p, m, bubble):
    """The order of 2p-1 micro-batches without the last ones has 6, 3, 2, 11, 7, 6 and 7/2."""
    timeline = simulate(zbv(2 * p, m))
    assert timeline.bubble == Fraction(bubble) and max(timeline.peak_live) == min(m, p)


def test_picture():
    check_picture("zbv", 4, 4)


def test_counts():
    check_counts_are_checked(lambda ranks, batches: zbv(ranks, batches))
    with pytest.raises(ScheduleError, match="num_stages=5: this schedule has two stages on every rank.*num_stages=6"):
        zbv(5, 4)
