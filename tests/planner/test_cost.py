"""Costs of layers, against counts by hand."""

import pytest

from jaxpipe.errors import ShardingError
from jaxpipe.hardware.chips import as_chip
from jaxpipe.planner.cost import Costs, Linear
from jaxpipe.planner.measured import Measured
from tests.planner.gpts import CUT, model

WIDTH, LENGTH = 16, 8
CHIP = {"peak_flops": 1e3, "memory": 1e9, "bandwidth": 1e9, "link": 10.0}


def costs(**sizes):
    return Costs(model(width=WIDTH, length=LENGTH, **sizes), as_chip(CHIP))


def products(rows):
    """Operations of a block's forward: qkv, out, up and down, and scores and mixing of attention."""
    return rows * LENGTH * 2 * (12 * WIDTH**2 + 2 * LENGTH * WIDTH)


@pytest.mark.parametrize("rows", [1, 3])
def test_operations_of_a_block_for_any_number_of_rows(rows):
    """The example has two rows."""
    found = costs(rows=2)
    plain, again = found.layer(1, "none", 1), found.layer(1, "layer", 1)
    assert plain.forward.flops(rows) == pytest.approx(products(rows))
    assert plain.backward.flops(rows) == pytest.approx(2 * products(rows))
    # The last product is not needed again.
    down = rows * LENGTH * 2 * 4 * WIDTH**2
    assert again.backward.flops(rows) == pytest.approx(3 * products(rows) - down)
    # I: all of it but the weights' gradients.
    assert plain.input.flops(rows) == pytest.approx(2 * products(rows) - rows * LENGTH * 2 * 12 * WIDTH**2)
    compute, memory, link = plain.forward.seconds(rows, found.chip, 1)
    assert compute == pytest.approx(products(rows) / 1e3) and memory < 1e-4 and link == 0


def test_bytes_that_take_longer_than_the_operations():
    found = Costs(model(width=WIDTH, length=LENGTH), as_chip(CHIP | {"peak_flops": 1e15, "bandwidth": 1.0}))
    compute, memory, _ = found.layer(1, "none", 1).forward.seconds(1, found.chip, 1)
    assert memory > 1e3 * compute


def test_two_devices_of_the_model_axis_have_half_the_products_and_sum_their_results():
    found = costs(sharding=CUT)
    whole, half = found.layer(1, "none", 1), found.layer(1, "none", 2)
    assert half.forward.flops(1) == pytest.approx(whole.forward.flops(1) / 2)
    assert half.backward.flops(1) == pytest.approx(whole.backward.flops(1) / 2)
    summed = 2 * LENGTH * WIDTH * 2  # two sums of an activation in bfloat16
    assert half.forward.seconds(1, found.chip, 2)[2] == pytest.approx(2 * summed / 2 / 10)
    # Backward: three for the input of q, k and v, which are three products here, and one for that of `up`.
    assert half.backward.seconds(1, found.chip, 2)[2] == pytest.approx(4 * summed / 2 / 10)
    block, cut = found.weights(1)[1], found.weights(2)[1]
    assert (block.numbers, cut.numbers) == (12 * WIDTH**2 + 2 * WIDTH, 6 * WIDTH**2 + 2 * WIDTH)
    assert cut.cut and not block.cut and cut.computed == 2 * cut.numbers


def test_an_axis_that_does_not_divide_is_refused():
    with pytest.raises(ShardingError, match="no multiple"):
        costs(sharding=CUT).weights(3)


def test_a_line_through_two_points():
    assert Linear.of(5.0, 7.0, 2) == Linear(3.0, 1.0) and Linear(3.0, 1.0).at(4) == 7.0


def test_seconds_that_were_measured_are_scaled_to_the_rows():
    class Source:
        name = "a clock"

        def measure(self, traced):
            return Measured(4.0, 9.0)

    found = Costs(model(rows=2), as_chip(CHIP), Source())
    forward, back, part = (each.sum() for each in found.seconds(1, "none", 6, 1))
    assert (forward, back) == (12.0, 27.0) and 0 < part < back
    assert found.loss_seconds(6, 1).sum() == 27.0 and found.source == "a clock"
