"""Groups of micro-batches, and the order in which they visit the chunks."""

import itertools

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.chunk_order import count_ranks, groups, in_a_loop, visits


def test_groups_are_of_nearly_one_size_and_no_smaller_than_they_can_be():
    for p, m in itertools.product(range(1, 9), range(1, 33)):
        found = groups(p, m)
        assert [micro_batch for group in found for micro_batch in group] == list(range(m))
        sizes = [len(group) for group in found]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
        assert sizes[-1] >= min(p, m) and len(found) == max(1, m // p)


def test_visits_of_groups():
    found = visits(2, 5, 2)  # groups of 3 and 2
    assert [time for time, _ in found] == list(range(10))
    assert [visit for _, visit in found] == [
        *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)),
        *((0, 3), (0, 4), (1, 3), (1, 4)),
    ]


def test_a_short_group_waits_until_it_has_come_round():
    assert visits(4, 2, 3) == [(0, (0, 0)), (1, (0, 1)), (4, (1, 0)), (5, (1, 1)), (8, (2, 0)), (9, (2, 1))]


def test_ranks():
    assert count_ranks(6, 3) == 2 and in_a_loop(6, 2) == (0, 1, 0, 1, 0, 1)
    with pytest.raises(ScheduleError, match="num_stages=7 cannot be dealt out as num_chunks=3 per rank.*num_stages=9"):
        count_ranks(7, 3)
