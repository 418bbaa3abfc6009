"""GPipe: what its docstring claims."""

from jaxpipe.schedules import Op, gpipe
from tests.schedules.claims import check_counts_are_checked, check_picture, check_training_table, on_many_sizes, tick_of


@on_many_sizes
def test_bubble_memory_and_ticks(p, m):
    check_training_table(gpipe(p, m), p, m, peak=lambda rank: m, ticks=2 * (m + p - 1))


@on_many_sizes
def test_formula(p, m):
    at = tick_of(gpipe(p, m))
    for s in range(p):
        for i in range(m):
            assert (at[Op("F", s, i)], at[Op("B", s, i)]) == (s + i, m + 2 * (p - 1) - s + i)


def test_picture():
    check_picture("gpipe", 4, 6)


def test_counts():
    check_counts_are_checked(gpipe)
