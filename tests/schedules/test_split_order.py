"""The order of a row whose backward comes in two halves, on counts so small that it can be read."""

import pytest

from jaxpipe.schedules.split_order import rows_as_ready, split_row


@pytest.mark.parametrize(
    ("count", "ahead", "behind", "expected"),
    [
        (3, 0, 0, "0F0 0I0 0W0 0F1 0I1 0W1 0F2 0I2 0W2"),
        (3, 1, 0, "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2"),
        (3, 0, 1, "0F0 0I0 0F1 0I1 0W0 0F2 0I2 0W1 0W2"),
        (3, 9, 2, "0F0 0F1 0F2 0I0 0I1 0I2 0W0 0W1 0W2"),
        (2, 9, 9, "0F0 0F1 0I0 0I1 0W0 0W1"),
    ],
)
def test_rows(count, ahead, behind, expected):
    works = [(0, micro_batch) for micro_batch in range(count)]
    assert " ".join(map(str, split_row(works, works, ahead=ahead, behind=behind))) == expected


def test_backwards_have_an_order_of_their_own():
    row = split_row([(0, 0), (1, 0)], [(1, 0), (0, 0)], ahead=2, behind=1)
    assert " ".join(map(str, row)) == "0F0 1F0 1I0 0I0 1W0 0W0"


def test_what_is_ready_runs_in_the_order_of_who_waits():
    """Two ranks in a V: rank 0 has stages 0 and 3, and is idle in tick 2 only, when nothing is ready."""
    rows = rows_as_ready((0, 1, 1, 0), 2)
    assert [" ".join(map(str, row)) for row in rows] == [
        "0F0 0F1 3F0 3I0 3F1 3I1 0I0 3W0 0I1 3W1 0W0 0W1",
        "1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 2W0 2W1 1W0 1W1",
    ]
    # On the last rank F of a micro-batch and I of the one before are ready at the same time.
    assert " ".join(map(str, rows_as_ready((0, 1), 3)[1])) == "1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2"
