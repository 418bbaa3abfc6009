"""The search, against looking at everything."""

import itertools

import pytest

from jaxpipe.errors import PartitionError
from jaxpipe.hardware.chips import as_chip
from jaxpipe.planner.candidate import Mesh
from jaxpipe.planner.cost import Costs
from jaxpipe.planner.search import REMATS, Cut, Search
from jaxpipe.planner.step import Steps
from tests.planner.gpts import CUT, model

SIZES = {"blocks": 5, "width": 64, "heads": 4, "length": 32, "vocabulary": 128}
CHIP = {"peak_flops": 1e12, "bandwidth": 1e11, "link": 5e9}


def search(chips, batch, memory, **options):
    return Search(Steps(Costs(model(**SIZES, **options), as_chip(CHIP | {"memory": memory}))), chips, batch)


def everything(found):
    """All candidates of all meshes."""
    for mesh in found.meshes(found.chips, found.sizes):
        rows = [n for n in range(1, found.global_batch + 1) if found.global_batch % (mesh.data * n) == 0]
        for n, remat in itertools.product(rows, REMATS):
            yield from found.candidates(Cut(mesh, 1, n, remat))


@pytest.mark.parametrize("memory", [1e9, 2.5e6, 1.6e6])
def test_nothing_is_faster_than_what_is_found(memory):
    """With room for all, for some and for few; chunks are left out of both."""
    found = search(6, 12, memory)
    found.schedules = {name: chunks for name, chunks in found.schedules.items() if chunks == (1,)}
    fitting = []
    for candidate in everything(found):
        step = found.step(candidate)
        assert step is not None
        assert found.least_seconds(candidate.mesh) <= found.steps.bound(candidate) * (1 + 1e-9)
        assert found.steps.bound(candidate) <= step.seconds * (1 + 1e-9)
        cut = Cut(candidate.mesh, candidate.chunks, candidate.rows, candidate.remat)
        assert found.least_seconds_of_cut(cut) <= step.seconds * (1 + 1e-9)
        assert found.least_bytes(candidate.mesh) <= found.least_bytes_of_cut(cut) <= step.total_bytes
        if step.total_bytes <= memory:
            fitting.append((step.seconds, candidate))
    assert fitting
    best = found.best(6)
    assert best[0].step.seconds == min(fitting)[0]
    assert [one.step.seconds for one in best] == sorted(one.step.seconds for one in best)
    groups = {}
    for seconds, candidate in sorted(fitting):
        groups.setdefault((candidate.mesh.data, candidate.mesh.model, candidate.schedule), seconds)
    assert [one.step.seconds for one in best] == sorted(groups.values())[:6]
    assert best == search_again(memory)


def search_again(memory):
    again = search(6, 12, memory)
    again.schedules = {name: chunks for name, chunks in again.schedules.items() if chunks == (1,)}
    return again.best(6)


def test_layers_are_cut_only_where_rules_say_so_and_dims_divide():
    assert search(6, 12, 1e9).sizes == [1]
    assert search(6, 12, 1e9, sharding=CUT).sizes == [1, 2]  # 64 is no multiple of 3


def test_what_does_not_fit_and_would_be_faster():
    found = search(6, 12, 1.6e6)
    best = found.best(1)[0].step.seconds
    others = found.faster_that_do_not_fit(3, best)
    assert others and all(one.step.seconds < best and one.step.total_bytes > 1.6e6 for one in others)


def test_the_fewest_chips():
    small = search(1, 12, 2.0e6)
    assert not small.best(1)
    nearest = small.nearest(3)
    assert nearest and all(one.step.total_bytes > 2.0e6 for one in nearest)
    least = small.smallest()
    assert least is not None and least.step.total_bytes <= 2.0e6 and least.candidate.mesh.size > 1
    assert not search(least.candidate.mesh.size - 1, 12, 2.0e6).best(1)
    assert search(least.candidate.mesh.size, 12, 2.0e6).best(1)
    assert search(1, 12, 1e3).smallest() is None


def test_a_cut_of_the_user_leaves_one_number_of_stages():
    found = search(6, 12, 1e9, partition_method=[0, 3, 7])
    assert {one.candidate.mesh.pipe for one in found.best(5)} == {2}
    with pytest.raises(PartitionError):
        found.steps.cutter.boundaries(3, "layer", 1)
    assert Mesh(1, 1) in found.meshes(1, [1])
