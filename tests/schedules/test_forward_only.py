"""Forward only, with and without chunks: what its docstring claims."""

from fractions import Fraction

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, forward_only, simulate
from tests.schedules.claims import check_counts_are_checked, check_picture, on_many_sizes


@pytest.mark.parametrize("v", [1, 2, 3])
@on_many_sizes
def test_ticks_bubble_and_placement(p, m, v):
    table = forward_only(p * v, m, num_chunks=v)
    assert table.forward_only
    assert table.placement == tuple(stage % p for stage in range(p * v))
    assert table.ticks == table.rows
    num_ticks = m * v + p - 1 if m >= p else p * v + m - 1
    assert len(table.ticks[0]) == num_ticks
    for sync in ("none", "neighbour", "global"):
        timeline = simulate(table, forward=3, sync=sync)
        assert timeline.makespan == Fraction(3 * num_ticks, v)
        assert m < p or timeline.bubble == Fraction((p - 1) * 3, v)
    assert timeline.peak_live == (Fraction(1, v),) * p
    if v == 1:
        assert all(op == Op("F", r, t - r) for r, row in enumerate(table.ticks) for t, op in enumerate(row) if op)


def test_buffers_do_not_grow_with_micro_batches():
    """What waits on rank 0 between two chunks is bounded by the ranks: the claim for groups over breadth-first."""
    for p, m in ((4, 7), (4, 9), (4, 64), (3, 100)):
        ticks = forward_only(2 * p, m, num_chunks=2).ticks
        arrives = {op.micro_batch: t + 1 for t, op in enumerate(ticks[p - 1]) if op and op.stage == p - 1}
        leaves = {op.micro_batch: t for t, op in enumerate(ticks[0]) if op and op.stage == p}
        waiting = max(sum(arrives[i] <= t <= leaves[i] for i in range(m)) for t in range(len(ticks[0])))
        assert waiting <= p


@pytest.mark.parametrize("counts", [(4, 6), (4, 4, 2)])
def test_picture(counts):
    check_picture("forward_only", *counts)


def test_counts():
    check_counts_are_checked(forward_only)
    with pytest.raises(ScheduleError, match="num_stages=5 cannot be dealt out as num_chunks=2.* Use num_stages=6"):
        forward_only(5, 4, num_chunks=2)
