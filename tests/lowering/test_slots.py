"""Interval colouring."""

from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.lowering.slots import colour


@given(st.dictionaries(st.integers(), st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=30))
def test_colouring_is_valid_and_optimal(raw):
    intervals = {key: (start, start + length) for key, (start, length) in raw.items()}
    slots, used = colour(intervals)
    assert slots.keys() == intervals.keys() and set(slots.values()) == set(range(used))
    for a, (first, last) in intervals.items():
        for b, (other_first, other_last) in intervals.items():
            if a != b and slots[a] == slots[b]:
                assert last < other_first or other_last < first
    busiest = max((sum(a <= t <= b for a, b in intervals.values()) for t in range(30)), default=0)
    assert used == busiest


def test_both_ends_of_an_interval_are_occupied():
    assert colour({}) == ({}, 0)
    assert colour({"a": (0, 2), "b": (3, 4), "c": (4, 5)}) == ({"a": 0, "b": 0, "c": 1}, 2)
