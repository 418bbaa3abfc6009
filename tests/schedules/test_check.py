"""Every way of breaking a table is found, and named."""

import re
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, Schedule, registry
from jaxpipe.schedules.check import check_positive, split_pairs
from tests.schedules.tables import examples, random_schedule, runs, tables


def cells(rows):
    return [(rank, column) for rank, row in enumerate(rows) for column, op in enumerate(row) if op is not None]


def mutable(rows):
    return [list(row) for row in rows]


@examples
@given(tables(), st.data())
def test_reordering_within_a_row_is_refused_exactly_if_it_deadlocks(table, data):
    rows, placement = table
    rank = data.draw(st.integers(0, len(rows) - 1))
    broken = (*rows[:rank], tuple(data.draw(st.permutations(rows[rank]))), *rows[rank + 1 :])
    if runs(broken):
        assert Schedule(broken, placement).rows == broken
    else:
        with pytest.raises(ScheduleError, match=r"^deadlock: rank \d+ is at \d+[FBIW]\d+ and waits for \d+[FBIW]\d+"):
            Schedule(broken, placement)


@examples
@given(tables(forward_only=False), st.data())
def test_swapping_an_op_with_one_it_needs_deadlocks(table, data):
    rows, placement = table
    rank, column = data.draw(st.sampled_from([at for at in cells(rows) if rows[at[0]][at[1]].kind != "F"]))
    op = rows[rank][column]
    forward = Op("F", op.stage, op.micro_batch)
    broken = mutable(rows)
    broken[rank][rows[rank].index(forward)], broken[rank][column] = op, forward
    with pytest.raises(ScheduleError, match="^deadlock: "):
        Schedule(broken, placement)


@examples
@given(tables(min_ranks=2), st.data())
def test_swapping_cells_of_two_ranks_is_refused(table, data):
    rows, placement = table
    one, other = data.draw(st.lists(st.sampled_from(cells(rows)), min_size=2, max_size=2, unique_by=lambda at: at[0]))
    broken = mutable(rows)
    broken[one[0]][one[1]], broken[other[0]][other[1]] = rows[other[0]][other[1]], rows[one[0]][one[1]]
    with pytest.raises(ScheduleError, match=r"is in row \d+, column \d+, but placement puts stage \d+ on rank \d+"):
        Schedule(broken, placement)


@examples
@given(tables(), st.data())
def test_dropping_an_op_is_refused(table, data):
    rows, placement = table
    rank, column = data.draw(st.sampled_from(cells(rows)))
    op = rows[rank][column]
    others = [rows[r][c] for r, c in cells(rows) if (r, c) != (rank, column)]
    # Without its only op of the last micro-batch, or its last backward, what is left is a smaller valid table.
    assume(any(other.micro_batch == op.micro_batch for other in others))
    assume(op.kind == "F" or any(other.kind != "F" for other in others))
    broken = mutable(rows)
    broken[rank][column] = None
    with pytest.raises(ScheduleError, match=rf"{op} is missing|{op.stage} for micro-batch {op.micro_batch} is wrong"):
        Schedule(broken, placement)


@examples
@given(tables(), st.data())
def test_duplicating_an_op_is_refused(table, data):
    rows, placement = table
    rank, column = data.draw(st.sampled_from(cells(rows)))
    broken = mutable(rows)
    broken[rank].append(rows[rank][column])
    with pytest.raises(ScheduleError, match=f"{rows[rank][column]} occurs twice, in row {rank}, column"):
        Schedule(broken, placement)


@examples
@given(tables(forward_only=False), st.data())
def test_backward_is_b_or_i_and_w_never_another_mix(table, data):
    rows, placement = table
    rank, column = data.draw(st.sampled_from([at for at in cells(rows) if rows[at[0]][at[1]].kind != "F"]))
    op = rows[rank][column]
    kind = data.draw(st.sampled_from([kind for kind in "BIW" if Op(kind, op.stage, op.micro_batch) not in rows[rank]]))
    broken = mutable(rows)
    broken[rank].append(Op(kind, op.stage, op.micro_batch))
    with pytest.raises(ScheduleError, match=f"stage {op.stage} for micro-batch {op.micro_batch} is wrong: .* either"):
        Schedule(broken, placement)


@pytest.mark.parametrize("name", sorted(registry.TRAINING))
def test_swapping_two_cells_of_a_built_in_table_runs_or_names_a_cell(name):
    """The oracle of the order within a row is a graph without a cycle. Whatever is refused names an op that was moved or
    waits."""
    chunks = registry.chunks_of(name, 2 if name in registry.CHUNKED else 1)
    random, table = Random(name), registry.get(name, 3 * chunks, 5, chunks)
    refused = 0
    for _ in range(40):
        rows = mutable(table.rows)
        (rank, column), (other, its_column) = random.sample(cells(rows), 2)
        moved = rows[rank][column], rows[other][its_column]
        rows[rank][column], rows[other][its_column] = reversed(moved)
        if rank == other and runs(rows):
            Schedule(rows, table.placement)
            continue
        refused += 1
        message = "deadlock: rank" if rank == other else r"is in row \d, column \d+, but placement puts stage"
        with pytest.raises(ScheduleError, match=message) as caught:
            Schedule(rows, table.placement)
        named = {text for text in re.findall(r"\d+[FBIW]\d+", str(caught.value))}
        assert named and (rank == other or named <= {str(op) for op in moved})
    assert refused > 20


@pytest.mark.parametrize("backward", ["whole", "split", "mixed"])
def test_random_schedules_are_of_all_kinds(backward):
    found = [random_schedule(seed, backward=backward) for seed in range(60)]
    assert found[:3] == [random_schedule(seed, backward=backward) for seed in range(3)]
    assert {table.num_chunks for table in found} == {1, 2, 3} and {table.num_ranks for table in found} == {2, 3, 4}
    assert any(table.placement[0] != 0 for table in found) and {table.num_micro_batches for table in found} == {
        1,
        2,
        3,
        4,
    }
    neighbours = [list(zip(table.placement, table.placement[1:], strict=False)) for table in found]
    assert any(a == b for pairs in neighbours for a, b in pairs) and any(
        abs(a - b) > 1 for pairs in neighbours for a, b in pairs
    )
    kinds = [{op.kind for row in table.rows for op in row} for table in found]
    assert all(kind == {"whole": set("FB"), "split": set("FIW")}.get(backward, kind) for kind in kinds)
    assert backward != "mixed" or set("FBIW") in kinds


def test_deadlock_message_names_every_waiting_rank():
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    assert str(caught.value) == (
        "deadlock: rank 0 is at 0B0 and waits for 1B0; rank 1 is at 1F1 and waits for 0F1. A rank works through its "
        "row in order, so each op must come after the ops it needs: move the waited-for op forward in its row, or the "
        "waiting op back."
    )


@pytest.mark.parametrize(
    ("rows", "placement", "message"),
    [
        ([], (), "a schedule with 0 rows and 0 stages is empty"),
        ([[None]], (0,), "idle cells only"),
        ([[Op("F", 0, 0)]], (1,), r"stage 0 on rank 1, but the table has 1 rows; ranks are 0..0"),
        ([[Op("F", 0, 0)], []], (0,), "rank 1 holds no stage"),
        ([[Op("F", 1, 0)]], (0,), r"1F0 \(row 0, column 0\) belongs to stage 1, but placement has 1 stages"),
        ([["0F0"]], (0,), "row 0, column 0 holds '0F0', which is not an Op; .* Schedule.from_csv"),
        ([[Op("F", 0, 1)]], (0,), "0F0 is missing: the table has 2 micro-batches, 0..1"),
        ([[Op("F", 0, 0)], [Op("F", 1, 1)]], (0, 1), "0F1 is missing"),
    ],
)
def test_malformed_tables(rows, placement, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(rows, placement)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "2", None, 10**7])
def test_counts(count):
    with pytest.raises(
        ScheduleError, match="num_stages=.*: (it must be an integer of at least 1|a table with so many)"
    ):
        check_positive(num_micro_batches=1, num_stages=count)
    assert check_positive(num_stages=np.int8(4), num_micro_batches=1) == (4, 1)


def test_the_pairs_whose_backward_is_split():
    ops = [Op.parse(cell) for cell in ("0F0", "0B0", "1I0", "1W0", "1B1")]
    assert split_pairs(ops) == {(1, 0)}
