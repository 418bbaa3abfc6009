"""The event loop, against longest paths of a graph; and how a deadlock shows."""

from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.schedules import Op, Schedule
from jaxpipe.schedules.clock import earliest_starts
from tests.schedules.tables import examples, longest_paths, tables


def cells(*texts):
    return tuple(Op.parse(text) if text else None for text in texts)


@examples
@given(tables(), st.integers(0, 3))
def test_every_start_is_a_longest_path(table, wait):
    rows, placement = table

    def duration(op):
        return {"F": 1, "B": 3, "I": 2, "W": 1}[op.kind]

    def delay(source, op):
        return wait if placement[source.stage] != placement[op.stage] else 0

    found = earliest_starts(rows, Schedule(rows, placement).needs, duration=duration, delay=delay)
    assert found == longest_paths(rows, duration, delay)


def test_idle_cells_cost_nothing_and_order_is_kept():
    rows = (cells("0F0", "", "", "0F1"), cells("", "1F1", "1F0"))
    found = earliest_starts(rows, lambda op: (Op("F", 0, op.micro_batch),) if op.stage else ())
    assert {str(op): start for op, start in found.items()} == {"0F0": 0, "0F1": 1, "1F1": 2, "1F0": 3}


def test_what_can_never_start_is_absent():
    """Rank 1 waits for an op that comes after one that waits for rank 1."""
    rows = (cells("0F0", "0B0", "0F1"), cells("1F1", "1F0", "1B0"))
    needs = {"0B0": ("1B0",), "1F1": ("0F1",), "1F0": ("0F0",)}
    found = earliest_starts(rows, lambda op: cells(*needs.get(str(op), ())))
    assert [str(op) for op in found] == ["0F0"]
