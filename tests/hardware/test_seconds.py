"""From cycles to seconds, counted by hand."""

import pytest

from jaxpipe import schedules
from jaxpipe.hardware.chips import Chip
from jaxpipe.hardware.collectives import Collective
from jaxpipe.hardware.seconds import Costs, estimate
from jaxpipe.hardware.structure import Op
from jaxpipe.lowering.lower import lower

CHIP = Chip("slow", 100.0, 1e6, 1e6, 1000, 10.0)
F, B = Op("F", 0), Op("B", 0)


def op_of(cell):
    return Op(cell.kind, 0)


def test_one_rank():
    """Three micro-batches at 100 cycles per second; 6 ticks."""
    costs = Costs(
        {F: 200, B: 500}, {F: 0, B: 100}, 10, 0, 50, [Collective("all-reduce", 20, 1, False, "outside over data")]
    )
    found = estimate(lower(schedules.one_f_one_b(1, 3)), op_of, costs, CHIP)
    assert found == pytest.approx(
        {
            "forward": 3 * 2.0,
            "backward": 3 * 4.0,
            "tail": 3 * 1.0,
            "loop": 6 * 0.1,
            "transfers": 2 * 20 / (2 * 10),  # there and back, over the two links of a ring
            "optimizer": 0.5,
            "waiting": 0.0,
        }
    )


def test_transfers_inside_of_ops_are_waited_for():
    """Two ranks, one micro-batch: F0 F1 B1 B0, each of 1 s, and 2 s of a sum in each F."""
    inside = [Collective("all-reduce", 20, 1, False, "forward over model")]
    costs = Costs({F: 100, B: 100}, {F: 0, B: 0}, 0, 0, 0, inside, {F: inside, B: []})
    found = estimate(lower(schedules.one_f_one_b(2, 1)), op_of, costs, CHIP)
    assert sum(found.values()) == pytest.approx(2 * (1 + 2) + 2 * 1)
    assert (found["forward"], found["transfers"], found["waiting"]) == pytest.approx((1, 2, 4))


def test_hidden_transfers_take_no_time():
    def seconds(asynchronous):
        permute = Collective("collective-permute", 5, 10, asynchronous, "loop over pipe")
        costs = Costs({F: 100, B: 100}, {F: 0, B: 0}, 0, 0, 0, [permute])
        return estimate(lower(schedules.one_f_one_b(2, 4)), op_of, costs, CHIP)

    assert seconds(True)["transfers"] == 0 and seconds(False)["transfers"] == 10 * 5 / 10
    assert sum(seconds(True).values()) == pytest.approx(2 * (4 + 1))  # and a rank is idle for 2 s of them
    assert seconds(True)["waiting"] == pytest.approx(2) and sum(seconds(False).values()) > 10
