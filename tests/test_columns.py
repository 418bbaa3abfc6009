"""Tables as text."""

import pytest

from jaxpipe.columns import columns, counted, listed, ranges, short


def test_columns_are_aligned():
    rows = [["name", "size", "why"], ["a", "1,000", ""], ["longer", "2", "two"]]
    assert columns(rows, left={0, 2}) == ["name     size  why", "a       1,000", "longer      2  two"]


def test_numbers_in_short_forms():
    assert [ranges(numbers) for numbers in ([], [3], [5, 0, 1, 2])] == ["", "3", "0-2, 5"]
    assert ranges(range(1, 20, 2), most=4) == "1, 3, ..., 19" and listed("abc", 3, " ") == "a b c"
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert counted(2, "process", "processes") == "2 processes"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9999, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (12_582_912, "12.6 MB"),
        (10**19, "10000 PB"),
    ],
)
def test_three_digits(number, text):
    assert short(number, "B") == text
    assert short(999) == "999" and short(1.5e9) == "1.50 G"
