"""Which rows a process brings. With one process these are all of them, whichever way the mesh is cut."""

import numpy as np
import pytest
from jax.sharding import Mesh

import jaxpipe
from jaxpipe.data.share import Share
from jaxpipe.errors import MeshError
from jaxpipe.mesh import data_ranks_of


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


class Grid:
    """The part of a mesh that matters here, with devices of several processes."""

    axis_names = ("pipe", "data")

    def __init__(self, processes):
        self.devices = np.vectorize(Device, otypes=[object])(np.asarray(processes))


@pytest.mark.parametrize("local", [False, True])
def test_one_process_brings_everything(local):
    share = Share(jaxpipe.make_mesh(pipe=2, data=4), local)
    assert share.mine == (0, 1, 2, 3) and share.ranks == 4 and share.alike == [0]
    assert share.whole(8) == 8 and share.first(8) == 0
    alone = Share(Mesh(jaxpipe.make_mesh(pipe=2).devices[:, 0], ("pipe",)), local)
    assert alone.mine == (0,) and alone.whole(3) == 3


@pytest.mark.parametrize(
    ("processes", "ranks"),
    [
        ([[0, 0], [1, 1]], {0: (0, 1), 1: (0, 1)}),
        ([[0, 1], [0, 1]], {0: (0,), 1: (1,)}),
        ([[0, 0, 1, 1]], {0: (0, 1), 1: (2, 3)}),
        ([[0, 1, 0, 1]], {0: (0, 2), 1: (1, 3)}),
    ],
    ids=["pipe crosses", "data crosses", "two each", "in turn"],
)
def test_data_ranks_of_a_process(processes, ranks):
    assert {process: data_ranks_of(Grid(processes), process) for process in ranks} == ranks


def test_own_rows_are_one_slice(monkeypatch):
    monkeypatch.setattr("jaxpipe.data.share.Group.of", lambda mesh: type("Two", (), {"members": (0, 1)}))
    monkeypatch.setattr("jaxpipe.processes.rows.pipe_size", lambda mesh: 1)
    for module in ("data.share", "processes.rows"):
        monkeypatch.setattr(f"jaxpipe.{module}.data_size", lambda mesh: 4)
    share = Share(Grid([[0, 0, 1, 1]]), local=True)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert (share.mine, share.ranks, share.whole(6), share.first(6)) == ((2, 3), 2, 12, 6)
    assert share.alike == [0, 1] and "own data ranks" in share.rule
    with pytest.raises(MeshError, match="process 0 holds the data ranks 0, 2 of 4, so its rows are not one slice"):
        Share(Grid([[0, 1, 0, 1]]), local=True)
