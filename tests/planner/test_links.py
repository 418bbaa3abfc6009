"""Seconds per byte between chips, by hand."""

from dataclasses import replace

import numpy as np

from jaxpipe.hardware.chips import CHIPS, as_chip
from jaxpipe.planner.links import scatter, send

GPU = replace(CHIPS["a100"], link=8.0, network=1.0)  # eight in a group


def test_a_ring_within_a_group():
    assert scatter(GPU, 1, 1) == 0
    assert scatter(GPU, 4, 2) == 3 / 4 / 8
    assert scatter(replace(CHIPS["v5e"], link=8.0), 4, 1) == 3 / 4 / 16  # a torus goes round in both directions


def test_beyond_a_group_each_chip_sends_its_part():
    assert scatter(GPU, 16, 1) == 7 / 8 / 8 + 1 / 2 / 8
    assert scatter(GPU, 4, 8) == 3 / 4  # no two of the axis are in one group


def test_chips_of_which_nothing_is_known_have_one_link():
    chip = as_chip({"peak_flops": 1, "memory": 1, "bandwidth": 1, "link": 2})
    assert scatter(chip, 1024, 64) == 1023 / 1024 / 2
    assert send(chip, (0, 1, 2), 512).tolist() == [0.5, 0.5]


def test_neighbours_on_the_pipe_axis():
    assert send(GPU, (0, 1, 2, 3, 0), 4).tolist() == [1 / 8, 1.0, 1 / 8, 1.0]
    assert np.all(send(GPU, (0, 1, 2), 8) == 1.0)
