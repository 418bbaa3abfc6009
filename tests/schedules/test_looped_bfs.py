"""Looped breadth-first: what its docstring claims. Bubble and memory for many counts: contracts/test_schedule_bounds.py."""

from fractions import Fraction
from itertools import groupby

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import gpipe, looped_bfs, simulate
from tests.schedules.claims import COSTS, check_counts_are_checked, check_picture


def test_one_chunk_is_gpipe():
    for p, m in ((1, 1), (1, 3), (4, 2), (3, 7)):
        assert looped_bfs(p, m, num_chunks=1) == gpipe(p, m)


@pytest.mark.parametrize(("p", "m", "v"), [(1, 3, 2), (2, 4, 2), (4, 9, 2), (3, 5, 3), (4, 3, 2)])
def test_order_barriers_and_memory(p, m, v):
    table = looped_bfs(p * v, m, v)
    assert table.ticks == table.rows and table.placement == tuple(s % p for s in range(p * v))
    for rank, row in enumerate(table.rows):
        turns = [(key, len(list(ops))) for key, ops in groupby((op.kind, op.stage) for op in row if op)]
        mine = [rank + chunk * p for chunk in range(v)]
        assert turns == [(("F", stage), m) for stage in mine] + [(("B", stage), m) for stage in reversed(mine)]
    rounds = p - 1 if m >= p else (p - m) * v + m - 1
    for sync in ("none", "neighbour", "global"):
        timeline = simulate(table, **COSTS, sync=sync)
        assert timeline.bubble == Fraction(rounds, v) * sum(COSTS.values())
        assert timeline.peak_live == (m,) * p


def test_picture():
    check_picture("looped_bfs", 4, 4)


def test_counts():
    check_counts_are_checked(lambda stages, batches: looped_bfs(stages, batches, num_chunks=1))
    with pytest.raises(ScheduleError, match="num_stages=5 cannot be dealt out as num_chunks=2"):
        looped_bfs(5, 4)
