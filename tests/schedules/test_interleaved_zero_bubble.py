"""Interleaved ZB: what its docstring claims. Bubble and memory for many counts: contracts/test_schedule_bounds.py."""

from fractions import Fraction

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Schedule, interleaved_zero_bubble, simulate, zero_bubble
from tests.schedules.claims import COSTS, check_counts_are_checked, check_picture

# What torch.distributed.pipelining 2.13 writes for two ranks, four micro-batches and two stages per rank.
OF_TORCH = """
0F0,0F1,2F0,,2F1,2I0,2W0,0F2,2I1,2W1,0F3,0I0,0W0,2F2,0I1,0W1,2F3,2I2,2W2,2I3,2W3,0I2,0W2,0I3,0W3
,1F0,1F1,3F0,3I0,3F1,3I1,3W0,1F2,1I0,3W1,1F3,1I1,1W0,3F2,3I2,1W1,3F3,3I3,3W2,1I2,3W3,1I3,1W2,1W3
""".strip()


def ops(table):
    return [[op for op in row if op] for row in table.rows]


def test_one_chunk_is_zero_bubble_and_two_are_those_of_torch():
    for p, m in ((1, 3), (4, 2), (3, 7)):
        assert interleaved_zero_bubble(p, m, num_chunks=1) == zero_bubble(p, m)
    assert ops(interleaved_zero_bubble(4, 4)) == ops(Schedule.from_csv(OF_TORCH))


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 2), (4, 8, 3), (2, 6, 4)])
def test_bubble_memory_and_barriers(p, m, v):
    f, i, w = COSTS.values()
    table = interleaved_zero_bubble(p * v, m, v)
    timeline = simulate(table, **COSTS)
    assert timeline.bubble == Fraction(p - 1, v) * (f + i - w) and timeline.peak_live == (p,) * p
    assert table.ticks == table.rows and table.placement == tuple(s % p for s in range(p * v))
    assert simulate(table).makespan == simulate(table, sync="global").makespan, "every op takes one tick"


def test_picture():
    check_picture("interleaved_zero_bubble", 4, 4)


def test_counts():
    check_counts_are_checked(lambda stages, batches: interleaved_zero_bubble(stages, batches, num_chunks=1))
    with pytest.raises(ScheduleError, match="num_stages=5 cannot be dealt out as num_chunks=2"):
        interleaved_zero_bubble(5, 4)
