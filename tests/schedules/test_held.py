"""What ranks hold, op by op, on tables that can be read."""

from jaxpipe.schedules import Schedule, forward_only
from jaxpipe.schedules.held import Holding, changes, curve, peak

SPLIT = Schedule.from_csv("0F0,0F1,0I0,0I1,0W0,0W1\n")
MIXED = Schedule.from_csv("0F0,1F0,1B0,0I0,0W0\n")


def amounts(table, holding):
    return [(str(op), begins, ends) for op, begins, ends in changes(table, 0, holding)]


def test_halves_hand_over_from_one_to_the_other():
    found = amounts(SPLIT, Holding([10], [3]))
    assert found == [("0F0", 10, 0), ("0F1", 10, 0), ("0I0", 3, -10), ("0I1", 3, -10), ("0W0", 0, -3), ("0W1", 0, -3)]
    assert peak(SPLIT, 0, Holding([10], [3])) == 23, "while the first I runs"
    assert peak(SPLIT, 0, Holding([10], [30])) == 70, "two wait, and the second I still reads"


def test_without_a_weight_of_its_own_what_waits_is_what_was_kept():
    found = amounts(SPLIT, Holding([10]))
    assert found == [("0F0", 10, 0), ("0F1", 10, 0), ("0I0", 0, 0), ("0I1", 0, 0), ("0W0", 0, -10), ("0W1", 0, -10)]
    assert peak(SPLIT, 0, Holding([10])) == 20


def test_stages_of_a_rank_weigh_what_they_weigh():
    found = amounts(MIXED, Holding([10, 7], [3, 100]))
    assert found == [("0F0", 10, 0), ("1F0", 7, 0), ("1B0", 0, -7), ("0I0", 3, -10), ("0W0", 0, -3)]
    assert peak(MIXED, 0, Holding([10, 7], [3, 100])) == 17, "a whole backward leaves nothing to wait"


def test_a_forward_only_table_keeps_nothing_after_the_op():
    table = forward_only(2, 3, num_chunks=2)
    assert peak(table, 0, Holding([10, 7])) == 10
    assert amounts(table, Holding([10, 7]))[:2] == [("0F0", 10, -10), ("1F0", 7, -7)]


def test_the_curve_is_over_time():
    start = {str(op): 2 * column for column, op in enumerate(SPLIT.rows[0])}
    found = curve(SPLIT, 0, Holding([10], [3]), lambda op: start[str(op)], lambda op: start[str(op)] + 1)
    assert found == [(0, 10), (2, 20), (4, 23), (5, 13), (6, 16), (7, 6), (9, 3), (11, 0)]
    # Without a pause an op gives back in the moment in which the next one takes.
    found = curve(SPLIT, 0, Holding([10], [3]), lambda op: start[str(op)], lambda op: start[str(op)] + 2)
    assert found == [(0, 10), (2, 20), (4, 23), (6, 16), (8, 6), (10, 3), (12, 0)]
