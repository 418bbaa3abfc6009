"""Eager 1F1B: what its docstring claims."""

from jaxpipe.schedules import Op, eager_one_f_one_b
from tests.schedules.claims import check_counts_are_checked, check_picture, check_training_table, on_many_sizes, tick_of


@on_many_sizes
def test_bubble_memory_and_ticks(p, m):
    check_training_table(
        eager_one_f_one_b(p, m), p, m, peak=lambda rank: min(m, 2 * (p - 1 - rank) + 1), ticks=2 * (m + 2 * (p - 1))
    )


@on_many_sizes
def test_formula(p, m):
    at = tick_of(eager_one_f_one_b(p, m))
    for s in range(p):
        for i in range(m):
            assert (at[Op("F", s, i)], at[Op("B", s, i)]) == (2 * (i + s), 2 * (i + 2 * (p - 1) - s) + 1)


def test_picture():
    check_picture("eager_one_f_one_b", 4, 4)


def test_counts():
    check_counts_are_checked(eager_one_f_one_b)
