"""The rows that a process holds, on meshes of processes that are not there."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxpipe
from jaxpipe.errors import MeshError
from jaxpipe.processes.rows import rows_of_process
from tests.devices import cpus


def mesh_of(per_process, pipe, data, inside, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: cpus(*per_process))
    return jaxpipe.make_mesh(pipe=pipe, data=data, inside=inside)


@pytest.mark.parametrize(
    ("per_process", "pipe", "data", "inside", "expected"),
    [
        ((4, 4), 4, 2, "data", [(0, 12), (0, 12)]),
        ((4, 4), 4, 2, "pipe", [(0, 6), (6, 12)]),
        ((2, 2, 2, 2), 2, 4, "data", [(0, 6), (6, 12), (0, 6), (6, 12)]),
        ((1, 1, 1), 1, 3, "data", [(0, 4), (4, 8), (8, 12)]),
        ((3, 1), 2, 2, "data", [(0, 12), (6, 12)]),
    ],
)
def test_rows_of_every_process(per_process, pipe, data, inside, expected, monkeypatch):
    mesh = mesh_of(per_process, pipe, data, inside, monkeypatch)
    assert [rows_of_process(mesh, 12, process) for process in range(len(per_process))] == [
        slice(*rows) for rows in expected
    ]
    assert jaxpipe.local_rows(mesh, np.int64(12)) == slice(*expected[0])


def test_all_rows_without_a_data_axis():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("pipe",), axis_types=(AxisType.Auto,))
    assert jaxpipe.local_rows(mesh, 7) == slice(0, 7)
    assert jaxpipe.local_rows(jaxpipe.make_mesh(pipe=2, data=3), 6) == slice(0, 6)


def test_what_is_no_slice_of_rows(monkeypatch):
    mesh = mesh_of((4, 4), 2, 4, "pipe", monkeypatch)
    odd = Mesh(mesh.devices[:, [0, 2, 1, 3]], ("pipe", "data"), axis_types=(AxisType.Auto,) * 2)
    for arguments, message in (
        ((mesh, 6, 0), "6 rows cannot be split over 4 data ranks"),
        ((mesh, 0, 0), r"rows=0\)"),
        ((mesh, 4.0, 0), r"rows=4.0\)"),
        ((mesh, 8, 2), r"process 2 has no device of the mesh.* \[0, 1\]"),
        ((odd, 8, 1), "process 1 holds the data ranks 1, 3 of 4"),
        (("pipe=2", 8, 0), "expected a jax.sharding.Mesh"),
    ):
        with pytest.raises(MeshError, match=message):
            rows_of_process(*arguments)
