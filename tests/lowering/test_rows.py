"""Rows of integers, there and back."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe import schedules
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import Cell
from jaxpipe.lowering.rows import Columns, Now

numbers = st.integers(-1, 2**31 - 1)


@given(st.data(), st.integers(0, 3), st.integers(0, 3))
def test_a_row_says_what_its_cell_says(data, num_pools, num_channels):
    columns = Columns(tuple(f"pool {n}" for n in range(num_pools)), num_channels)

    def some(size):
        return tuple(data.draw(st.lists(numbers, min_size=size, max_size=size)))

    stage, micro_batch, read, branch = some(4)
    cell = Cell("F", stage, micro_batch, some(num_pools), read, some(num_channels))
    row = columns.encode(cell, branch)
    assert len(row) == len(columns) == 4 + num_pools + num_channels
    found = columns.decode(row)
    slots = dict(zip(columns.pools, cell.slots, strict=True))
    assert found == (branch, Now(stage, micro_batch, slots, read), cell.arrive)


def test_an_idle_cell_has_no_slots_and_no_arrivals():
    columns = Columns(("saved", "other"), 3)
    found = columns.decode(columns.encode(Cell(), 0))
    assert found == (0, Now(-1, 0, {"saved": -1, "other": -1}, -1), (-1, -1, -1))


def test_a_cell_of_another_program_does_not_fit():
    with pytest.raises(AssertionError, match="does not fit"):
        Columns(("saved",), 1).encode(Cell("F", 0, 0, (1, 2)), 1)
    with pytest.raises(AssertionError, match="does not fit"):
        Columns(("saved",), 1).encode(Cell("F", 0, 0, (1,), -1, (0, 0)), 1)


@pytest.mark.parametrize(("stages", "width"), [(1, 5), (3, 7)])
def test_columns_of_a_program_and_arrays_for_rows(stages, width):
    program = lower(schedules.one_f_one_b(stages, 4))
    columns = Columns.of(program)
    assert len(columns) == width, "branch, stage, micro-batch, read, a pool, and a column per channel"
    for row in program.cells:
        for cell in row:
            plain = columns.encode(cell, 2)
            assert columns.decode(jnp.asarray(plain)) == columns.decode(plain)
