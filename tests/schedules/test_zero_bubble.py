"""ZB-H1: what its docstring claims. Bubble and memory for many counts: contracts/test_schedule_bounds.py."""

from jaxpipe.schedules import simulate, zero_bubble
from tests.schedules.claims import COSTS, check_counts_are_checked, check_picture, on_many_sizes


@on_many_sizes
def test_every_backward_is_split_and_w_waits_for_so_long(p, m):
    table = zero_bubble(p, m)
    assert table.placement == tuple(range(p)) and table.ticks == table.rows
    for rank, row in enumerate(table.rows):
        assert all(op.kind != "B" and op.stage == rank for op in row if op)
        pending = most = 0
        for op in filter(None, row):
            pending += {"F": 0, "I": 1, "W": -1}[op.kind]
            most = max(most, pending)
        assert most == min(rank + 1, m), "r wait, and one more between an I and the W that follows"


def test_bubble_and_memory_of_the_paper():
    f, i, w = COSTS.values()
    for p, m in ((4, 4), (4, 9), (8, 16)):
        timeline = simulate(zero_bubble(p, m), **COSTS)
        assert timeline.bubble == (p - 1) * (f + i - w) and timeline.peak_live == (p,) * p
    assert simulate(zero_bubble(4, 8), sync="global").makespan == simulate(zero_bubble(4, 8)).makespan == 27


def test_picture():
    check_picture("zero_bubble", 4, 6)


def test_counts():
    check_counts_are_checked(zero_bubble)
