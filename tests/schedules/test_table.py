"""A table: what is derived from its rows, and how it is put on a clock and shown."""

import pytest
from hypothesis import given

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, Schedule, gpipe, one_f_one_b
from tests.schedules.tables import edges, examples, longest_paths, tables


@examples
@given(tables())
def test_properties(table):
    rows, placement = table
    schedule = Schedule(rows, placement)
    ops = [op for row in rows for op in row if op is not None]
    assert schedule.num_ranks == len(rows)
    assert schedule.num_stages == len({op.stage for op in ops})
    assert schedule.num_micro_batches == len({op.micro_batch for op in ops})
    assert schedule.num_chunks == max(len({op.stage for op in row if op}) for row in rows)
    assert schedule.forward_only == all(op.kind == "F" for op in ops)
    assert schedule.split_backward == any(op.kind == "W" for op in ops)
    assert {op: set(schedule.needs(op)) for op in ops} == edges(rows)[1]
    assert hash(schedule) == hash(Schedule([list(row) for row in rows], list(placement)))
    assert schedule == Schedule([list(row) for row in rows], list(placement))


@examples
@given(tables())
def test_ticks_are_a_common_clock(table):
    rows, placement = table
    schedule = Schedule(rows, placement)
    at = {op: tick for row in schedule.ticks for tick, op in enumerate(row) if op is not None}
    before, data = edges(rows)
    assert len({len(row) for row in schedule.ticks}) == 1
    assert all(at[source] < at[op] for op in at for source in before[op]), "needs precede, and rows keep their order"
    column = {op: position for row in rows for position, op in enumerate(row) if op is not None}
    if all(column[source] < column[op] for op in column for source in data[op]):
        assert at == column, "aligned rows are returned as they are"
    else:
        assert at == longest_paths(rows, lambda op: 1, lambda source, op: 0), "others as soon as possible"


def test_texts():
    assert repr(gpipe(4, 8)) == "<Schedule 4 ranks x 8 micro-batches, 22 ticks>"
    chunked = Schedule.from_csv("0F0,,2F0\n,1F0,,3F0\n")
    assert repr(chunked) == "<Schedule 2 ranks x 2 chunks x 1 micro-batches, 4 ticks>"
    assert str(chunked) == "rank 0 | 0F0 ..  2F0 ..\nrank 1 | ..  1F0 ..  3F0"
    wide = str(one_f_one_b(2, 40))
    assert max(map(len, wide.splitlines())) <= 120
    assert wide.startswith("ticks 0..") and wide.count("rank 1 |") == 3


@examples
@given(tables())
def test_text_shows_every_op(table):
    schedule = Schedule(*table)
    words = [word for line in str(schedule).splitlines() for word in line.partition("|")[2].split() if word != ".."]
    assert len(words) == sum(op is not None for row in schedule.rows for op in row)


def test_from_ticks_refuses_two_ops_in_one_cell():
    with pytest.raises(ScheduleError, match="0F1 and 0F0 are both at tick 0 of rank 0"):
        Schedule.from_ticks({Op("F", 0, 0): 0, Op("F", 0, 1): 0}, placement=(0,))


@pytest.mark.parametrize("rows", [None, 5, [5], [[5]], [["0F0"]]], ids=str)
def test_what_is_no_table(rows):
    with pytest.raises(ScheduleError):
        Schedule(rows, [0])
