"""Words and numbers of pictures."""

import pytest

from jaxpipe.schedules import Op, one_f_one_b, simulate, zbv
from jaxpipe.schedules.captions import amount, chunk_of, label, title


def test_title_and_labels():
    timeline = simulate(zbv(4, 3), sync="global")
    assert (
        title(timeline, "zbv")
        == "zbv: 2 ranks x 2 chunks, 3 micro-batches: makespan 9.5 (global sync), bubble 0.5 = 5.3%"
    )
    assert label(Op("W", 3, 1), zbv(4, 3)) == "3W1" and label(Op("B", 1, 2), one_f_one_b(2, 3)) == "B2"
    assert [chunk_of(Op("F", stage, 0), zbv(4, 3)) for stage in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (13_800_000_000, "13.8 GB"), (5e15, "5000 TB")],
)
def test_bytes(value, text):
    assert amount(simulate(one_f_one_b(1, 1), memory=[1]), value) == text


def test_micro_batches():
    assert amount(simulate(one_f_one_b(1, 1)), 2.5) == "2.5"
