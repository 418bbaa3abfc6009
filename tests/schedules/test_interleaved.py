"""Interleaved 1F1B: what its docstring claims. Bubble and memory for many counts: contracts/test_schedule_bounds.py."""

from fractions import Fraction

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, eager_one_f_one_b, interleaved, simulate
from tests.schedules.claims import COSTS, check_counts_are_checked, check_picture, tick_of


def test_one_chunk_is_eager_1f1b():
    for p, m in ((1, 1), (1, 3), (4, 2), (3, 7)):
        assert interleaved(p, m, num_chunks=1) == eager_one_f_one_b(p, m)


@pytest.mark.parametrize(("p", "m", "v"), [(1, 3, 2), (2, 4, 2), (4, 9, 2), (3, 5, 3), (4, 3, 2), (8, 16, 4)])
def test_barriers_cost_nothing_and_no_column_mixes_kinds(p, m, v):
    table = interleaved(p * v, m, v)
    assert table.ticks == table.rows and table.placement == tuple(s % p for s in range(p * v))
    assert not table.split_backward
    rounds = p - 1 if m >= p else (p - m) * v + m - 1
    for sync in ("none", "neighbour", "global"):
        assert simulate(table, **COSTS, sync=sync).bubble == Fraction(rounds, v) * sum(COSTS.values())
    for tick, column in enumerate(zip(*table.ticks, strict=True)):
        assert {op.kind for op in column if op} <= {"FB"[tick % 2]}


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 3), (4, 10, 2), (3, 8, 2)])
def test_warm_up_is_that_of_megatron(p, m, v):
    largest = -(-m // (m // p))
    for rank, row in enumerate(interleaved(p * v, m, v).rows):
        kinds = "".join(op.kind for op in row if op)
        assert kinds.index("B") == 2 * (p - 1 - rank) + (v - 1) * largest + 1  # its steady state begins with a forward


def test_values_travel_beside_a_column():
    at = tick_of(interleaved(6, 6, 2))
    for op, tick in at.items():
        if op.stage > 0:
            assert tick - at[Op("F", op.stage - 1, op.micro_batch)] >= 2 or op.kind == "B"
        if op.kind == "B" and op.stage < 5:
            assert tick - at[Op("B", op.stage + 1, op.micro_batch)] >= 2


def test_picture():
    check_picture("interleaved", 4, 4)


def test_counts():
    check_counts_are_checked(lambda stages, batches: interleaved(stages, batches, num_chunks=1))
    with pytest.raises(ScheduleError, match="num_stages=5 cannot be dealt out as num_chunks=2"):
        interleaved(5, 4)
