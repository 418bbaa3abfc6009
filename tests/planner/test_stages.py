"""Stages: where they are cut, and what they cost."""

import numpy as np
import pytest

from jaxpipe.planner.candidate import Candidate, Mesh
from jaxpipe.planner.stages import groups
from tests.planner.gpts import steps

SIZES = {"blocks": 6, "width": 32, "heads": 4, "length": 16, "vocabulary": 32 * 6 * 12}  # the head is as dear as blocks


def candidate(pipe, remat="layer", chunks=1):
    return Candidate(Mesh(pipe, 1), "1f1b", chunks, 4, 2, remat, 0)


def test_the_tail_is_balanced_and_runs_in_the_backward():
    found = steps(**SIZES)
    boundaries, stages = found.cut(candidate(4))
    assert boundaries[-2:] == (7, 8)  # the head alone
    assert stages.ops.forward[-1] == 0 and stages.ops.input[-1] > stages.ops.input[1]
    total = sum(part.sum() for part in stages.ops)
    assert stages.kinds.sum() == pytest.approx(total)
    assert found.cutter.total("layer", 2, 1)[0] == pytest.approx(total)


def test_what_stages_save():
    found = steps(**SIZES)
    message = 2 * 16 * 32 * 2
    _, layer = found.cut(candidate(4))
    _, stage = found.cut(candidate(4, "stage"))
    assert layer.message == message and layer.saved.max() == message * 3
    # The input of the first stage is the batch; the last one keeps the input of its tail, which is all it has.
    assert stage.saved.tolist() == [0, message, message, 0] and stage.tail == message
    assert np.array_equal(stage.ops.forward, layer.ops.forward)

    small = steps(**SIZES | {"vocabulary": 16})
    assert small.cut(candidate(4, "stage"))[1].work > small.cut(candidate(4))[1].work  # all layers of a stage at once


def test_a_cut_of_the_user_is_kept():
    found = steps(**SIZES, partition_method="uniform")
    assert found.cut(candidate(4))[0] == (0, 2, 4, 6, 8)


def test_groups_are_the_stacks_of_a_layout():
    assert groups(steps(blocks=3).costs) == [0, 1, 1, 1, 4]


def test_operations_that_the_model_needs():
    """Three times those of a forward; the loss has no products."""
    found = steps(blocks=1, width=8, length=4, vocabulary=16)
    forward = 2 * 4 * 2 * (12 * 64 + 2 * 4 * 8 + 8 * 16)
    assert found.cutter.useful_flops(2) == pytest.approx(3 * forward)
