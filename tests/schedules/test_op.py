"""Ops: what is one, and which others it waits for."""

import numpy as np
import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op
from jaxpipe.schedules.op import needs


@pytest.mark.parametrize(
    ("arguments", "message"), [(("X", 0, 0), "'X' is not a kind"), (("F", -1, 0), "count from 0"), (("F", 0, -1), "-1")]
)
def test_op_is_checked(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        Op(*arguments)


def test_numbers_of_other_libraries_are_pythons():
    op = Op("F", np.int64(1), np.int64(2))
    assert hash(op) == hash(Op("F", 1, 2)) and type(op.stage) is type(op.micro_batch) is int


@pytest.mark.parametrize("op", [Op("F", 0, 0), Op("B", 12, 345), Op("I", 1, 0), Op("W", 0, 7)], ids=str)
def test_text_and_back(op):
    assert Op.parse(str(op)) == op


@pytest.mark.parametrize("text", ["", "F0", "0F", "0f0", "-1F0", "0F0 ", "0F0F0", "\u0661F0", "0F" + "1" * 10, None, 5])
def test_what_is_no_cell(text):
    with pytest.raises(ScheduleError, match="is not an op; write stage, kind and micro-batch, such as 0F3"):
        Op.parse(text)


@pytest.mark.parametrize(
    ("op", "split", "wanted"),
    [
        ("0F3", [], []),
        ("1F3", [], ["0F3"]),
        ("1B3", [], ["1F3", "2B3"]),
        ("1I3", [(1, 3)], ["1F3", "2B3"]),
        ("1B3", [(2, 3)], ["1F3", "2I3"]),
        ("1B3", [(2, 2)], ["1F3", "2B3"]),
        ("2B3", [], ["2F3"]),
        ("2I3", [(2, 3)], ["2F3"]),
        ("1W3", [(1, 3)], ["1I3"]),
    ],
)
def test_what_an_op_waits_for(op, split, wanted):
    """Of three stages; `split` says whose backward comes in two parts."""
    assert [str(source) for source in needs(Op.parse(op), 3, set(split))] == wanted
