"""What shares an array: never more bytes than the vector alone would take, and rooms where they are for nothing."""

from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.executor.rooms import SLACK, with_rooms

sizes = st.dictionaries(st.integers(0, 3), st.integers(1, 50), max_size=4)


def total(candidates, chosen, others):
    left = dict(others)
    for candidate, room in zip(candidates, chosen, strict=True):
        if not room:
            for rank, size in candidate.items():
                left[rank] = left.get(rank, 0) + size
    rooms = sum(max(candidate.values()) for candidate, room in zip(candidates, chosen, strict=True) if room)
    return rooms + max(left.values(), default=0)


@given(st.lists(sizes, max_size=6), sizes)
def test_rooms_cost_no_bytes(candidates, others):
    chosen = with_rooms(candidates, others)
    alone = total(candidates, [False] * len(candidates), others)
    assert total(candidates, chosen, others) <= (1 + SLACK) * alone


def test_which_get_one():
    assert with_rooms([{0: 10, 3: 10}], {0: 2, 3: 1}) == [True], "an embedding and a head"
    assert with_rooms([{0: 10, 1: 10}, {2: 10, 3: 9}]) == [False, False], "two rooms on every rank, one array on each"
    assert with_rooms([{0: 30}, {0: 30}, {1: 30}]) == [True, False, False], (
        "what the fullest rank has over costs nothing"
    )
    assert with_rooms([{0: 60}, {1: 30}]) == [False, False]
    assert with_rooms([]) == [] and with_rooms([{}], {0: 3}) == [False]
