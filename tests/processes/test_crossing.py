"""What is said about meshes of processes that are not there."""

import jax
import pytest

import jaxpipe
from jaxpipe.processes.crossing import where
from tests.devices import cpus


@pytest.mark.parametrize(
    ("per_process", "sizes", "expected"),
    [
        ((8,), {"pipe": 4, "data": 2}, ["pipe 4 x data 2: 8 cpu devices in 1 process"]),
        (
            (4, 4),
            {"pipe": 4, "data": 2},
            [
                "pipe 4 x data 2: 8 cpu devices in 2 processes",
                "pipe crosses processes: ranks 0-1 in process 0; ranks 2-3 in process 1",
                "data stays inside a process",
            ],
        ),
        (
            (2, 2),
            {"pipe": 2, "data": 2, "inside": "pipe"},
            [
                "pipe 2 x data 2: 4 cpu devices in 2 processes",
                "pipe stays inside a process",
                "data crosses processes: rank 0 in process 0; rank 1 in process 1",
            ],
        ),
        (
            (2, 2, 2, 2),
            {"pipe": 2, "data": 4},
            [
                "pipe 2 x data 4: 8 cpu devices in 4 processes",
                "pipe crosses processes: rank 0 in processes 0-1; rank 1 in processes 2-3",
                "data crosses processes: ranks 0-1 in processes 0, 2; ranks 2-3 in processes 1, 3",
            ],
        ),
        (
            [2] * 40,
            {"pipe": 40, "data": 1, "model": 2},
            [
                "pipe 40 x data 1 x model 2: 80 cpu devices in 40 processes",
                "pipe crosses processes: "
                + "; ".join(f"rank {n} in process {n}" for n in range(6))
                + "; ...; rank 39 in process 39",
                "model stays inside a process",
            ],
        ),
    ],
)
def test_where_the_devices_are(per_process, sizes, expected, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: cpus(*per_process))
    assert where(jaxpipe.make_mesh(**sizes)) == expected
