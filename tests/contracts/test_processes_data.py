"""Data that do not fit on one of several processes: all go on together, or raise together."""

import math

import numpy as np
import pytest

from tests.contracts import processes_data
from tests.contracts.launched import launched

WORDS = {  # what process 0 and process 1 say of each fault; both say it in the same call
    "short": ("process 1 has no more data", "data_iter ended after 2 of 4 micro-batches"),
    "narrow": ("process 1 has micro-batches of other shapes", "process 1 has micro-batches of other shapes"),
    "other": ("process 1 has other labels than process 0", "process 1 has other labels than process 0"),
    "text": ("process 1 has data that do not fit", "Micro-batch 0 of data_iter: labels is 'no label'"),
    "spread": ("process 1 has data that do not fit", "on devices of several processes. Yield what this process has"),
    "raising": ("process 1 has data that do not fit", "data_iter raised KeyError: 'shard 7'"),
}


@pytest.fixture(scope="module")
def found():
    return launched("processes_data.py", 2, 2, 2, 2, *processes_data.CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_a_step_that_one_cannot_make_is_skipped_everywhere(found, name):
    for process, words in enumerate(WORDS[name]):
        told = found[process]["training"]["found"][name]
        assert words in told["message"] and told["call"] == 3 and told["as before"]
        assert len(told["losses"]) == 3 and all(map(math.isnan, told["losses"]))


@pytest.mark.slow
def test_steps_between_count_and_all_others_do_not(found):
    alone, scaling = processes_data.alone(2, 2)
    skipped = scaling[1]
    assert 0 < skipped < 6, "some steps overflowed, and training went on"
    for process in found:
        made = process["training"]
        np.testing.assert_allclose(made["losses"], alone, rtol=1e-6)
        assert made["steps"] == len(alone) - skipped and made["scaling"] == scaling
        between = made["found"]["between"]
        assert between["call"] == 0 and math.isnan(between["losses"][0]["losses"][0])
        assert made["found"]["counted"] == [10, 10, 10 * processes_data.M]
        # Before the first step nobody has started anything, so there is nothing to skip.
        assert (
            made["found"]["first"]["call"] == 0 and "other labels than process 0" in made["found"]["first"]["message"]
        )
        # All of them at their end say so at once, as one process does.
        assert made["found"]["end"]["call"] == 0 and "ended after 2 of 4" in made["found"]["end"]["message"]


@pytest.mark.slow
def test_evaluations_raise_everywhere_before_anything_is_computed(found):
    for name, (_, own) in WORDS.items():
        first, second = (process["evaluating"]["found"] for process in found)
        for told in (first[name], second[name], first[f"{name} in a data set"], second[f"{name} in a data set"]):
            assert told["call"] == 0 and not told["losses"]
        assert "rocess 1" in first[name]["message"] and "rocess 1" in first[f"{name} in a data set"]["message"]
        if own.startswith(("data_iter", "Micro")):
            assert own in second[name]["message"] and own in first[name]["message"]
    assert found[0]["evaluating"]["good"] == found[1]["evaluating"]["good"]


@pytest.mark.slow
@pytest.mark.parametrize(("pipe", "data"), [(2, 2), (1, 4)], ids=["pipe crosses", "data crosses"])
def test_own_rows_only(found, pipe, data):
    if (pipe, data) == (1, 4):
        found = launched("processes_data.py", 2, 2, 1, 4, "own rows")
        assert [process["own rows"]["ranks"] for process in found] == [[0, 1], [2, 3]]
    for process in found:
        for whole, local in process["own rows"]["pairs"]:
            np.testing.assert_allclose(local, whole, rtol=1e-6)
        # Two processes with the same rows must have the same numbers; with other rows they may have others.
        (loss,) = process["own rows"]["other"]["losses"]
        assert math.isnan(loss) == (data == 2)
