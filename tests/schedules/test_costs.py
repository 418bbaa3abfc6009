"""Costs of ops, transfers and memory: numbers are shared out, sequences are taken as they are, and mistakes are named."""

from fractions import Fraction

import numpy as np
import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, forward_only, interleaved, one_f_one_b, zbv
from jaxpipe.schedules.costs import edge_costs, op_costs, per_stage

TWO = interleaved(4, 2)  # two ranks, stages 0 and 2 on rank 0


def test_a_number_is_that_of_a_rank_and_a_sequence_that_of_the_stages():
    costs = op_costs(TWO, 3, [1, 2, 3, 4], Fraction(1, 2))
    assert costs.of == {
        "F": (Fraction(3, 2),) * 4,
        "I": (1, 2, 3, 4),
        "W": (Fraction(1, 4),) * 4,
        "B": tuple(i + Fraction(1, 4) for i in (1, 2, 3, 4)),
    }
    assert costs(Op("B", 2, 1)) == Fraction(13, 4) and costs.per_rank is None
    assert op_costs(TWO, 3, 1, 2).per_rank == 6 and op_costs(forward_only(4, 2), 3, 1, 2).per_rank == 3


def test_sequences_of_other_libraries():
    found = op_costs(TWO, np.array([1.0, 2.0, 3.0, 4.0]), np.float32(2), (np.int64(1),) * 4)
    assert found.of["F"] == (1.0, 2.0, 3.0, 4.0) and found.of["I"] == (1.0,) * 4 and found.of["W"] == (1,) * 4
    assert all(type(cost) is int for cost in found.of["W"])


def test_edges():
    assert edge_costs(TWO, 5) == {(0, 1): 5, (1, 0): 5}
    assert edge_costs(zbv(6, 2), 1) == {(0, 1): 1, (1, 0): 1, (1, 2): 1, (2, 1): 1}, "nothing goes round a V"
    assert edge_costs(forward_only(3, 2), 1) == {(0, 1): 1, (1, 2): 1}, "nothing comes back"
    assert edge_costs(TWO, {(0, 1): 5, (1, 0): Fraction(1, 3)}) == {(0, 1): 5, (1, 0): Fraction(1, 3)}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            lambda: op_costs(TWO, [1, 2], 1, 1),
            "forward has 2 entries, but the schedule has 4 stages on 2 ranks. Give one",
        ),
        (
            lambda: op_costs(one_f_one_b(2, 2), 1, [1], 1),
            "backward_input has 1 entries, but the schedule has 2 stages. Give",
        ),
        (lambda: op_costs(TWO, 1, 1, [1, 2, -3, 4]), r"backward_weight\[2\]=-3: a cost must be a finite number"),
        (lambda: op_costs(TWO, [1, 2, None, 4], 1, 1), r"forward\[2\]=None: a cost must be"),
        (lambda: op_costs(TWO, "1234", 1, 1), "forward='1234': a cost must be"),
        (lambda: op_costs(TWO, {0: 1}, 1, 1), "forward={0: 1}: a cost must be"),
        (lambda: op_costs(TWO, np.ones((4, 1)), 1, 1), r"forward\[0\]=array"),
        (lambda: per_stage("memory", 3, TWO), "memory=3: expected one number for each of the 4 stages, as a list"),
        (
            lambda: edge_costs(TWO, {(0, 1): 5}),
            r"comm has no time for \(1, 0\), but the schedule sends from rank 1 to rank 0",
        ),
        (
            lambda: edge_costs(TWO, {(0, 2): 5}),
            r"comm has the key \(0, 2\): a key is \(from rank, to rank\), and ranks are 0..1",
        ),
        (lambda: edge_costs(TWO, {"01": 5}), "comm has the key '01'"),
        (lambda: edge_costs(TWO, {(0, 1): -5}), r"comm\[\(0, 1\)\]=-5: a cost must be"),
        (lambda: edge_costs(TWO, [1, 2]), r"comm=\[1, 2\]: a cost must be"),
    ],
)
def test_mistakes(read, message):
    with pytest.raises(ScheduleError, match=message):
        read()
