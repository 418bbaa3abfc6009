"""In which ticks ops run: always in the order of the table, and mostly without waiting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe import schedules
from jaxpipe.lowering.channels import clock
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.pace import pace
from jaxpipe.lowering.sketch import sketch
from jaxpipe.lowering.timing import timed
from tests.lowering.programs import in_random_order, random_placements, shares


@given(random_placements(), st.integers(1, 5), st.integers(0, 2**32), shares)
def test_the_order_stays_and_inputs_come_before(placement, micro_batches, seed, split):
    table = in_random_order(placement, micro_batches, seed, split)
    ticks = timed(table)
    for row in table.rows:
        at = [ticks[op.kind, op.stage, op.micro_batch] for op in row if op is not None]
        assert at == sorted(set(at))
        for op in filter(None, row):
            assert all(
                ticks[n.kind, n.stage, n.micro_batch] < ticks[op.kind, op.stage, op.micro_batch]
                for n in table.needs(op)
            )


@pytest.mark.parametrize("name", ["1f1b", "eager_1f1b", "gpipe", "interleaved", "looped_bfs"])
def test_tables_that_wait_for_nothing_else_stay_as_they_are(name):
    table = schedules.get(name, 8 if name in ("interleaved", "looped_bfs") else 4, 8)
    assert timed(table) == clock(table)


# How much longer than without any waiting but for inputs, at most. It is what was found, rounded up.
LONGER = {"zero_bubble": (1.0, 1.0), "zbv": (1.06, 1.05), "interleaved_zero_bubble": (1.06, 1.34)}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", LONGER)
def test_split_tables_wait_little(name, number):
    costs = [(0.9, 1, 0.8), (1, 3.5, 0.5)][number]
    table = getattr(schedules, name)(4 if name == "zero_bubble" else 8, 16)
    cost = {kind: each / table.num_chunks for kind, each in zip("FIW", costs, strict=True)}
    free = float(schedules.simulate(table, *costs).makespan)
    found, written = (
        pace(program, lambda cell: cost[cell.kind]).total for program in (lower(table), sketch(table, clock(table)))
    )
    assert found <= LONGER[name][number] * free + 1e-9 and found < written


def test_a_table_without_columns_gets_those_of_1f1b():
    """Other people's 1F1B only orders its ops: as early as they can be, in ticks that mix F and B on all ranks."""
    table = schedules.one_f_one_b(4, 8)
    ordered = schedules.Schedule.from_order([[op for op in row if op] for row in table.rows], table.placement)
    assert clock(ordered) != clock(table)
    (loop,) = lower(ordered).loops
    assert loop.period == 2
    cost = {"F": 1, "B": 3}
    assert pace(lower(ordered), lambda cell: cost[cell.kind]).total == 8 * 4 + 3 * 4
