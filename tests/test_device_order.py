"""Which devices a mesh takes, and in which order, on processes and TPUs that are not there."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import mesh_utils

import jaxpipe
from jaxpipe.device_order import arrange, choose
from jaxpipe.errors import MeshError
from tests.devices import chips, cpus, owners


def made(devices, sizes, inside="data"):
    outer = {"data": "pipe", "pipe": "data"}[inside]
    grid = arrange(choose(devices, int(np.prod(list(sizes.values())))), sizes, outer, inside)
    assert grid.shape == tuple(sizes.values()) and len(set(grid.flat)) == grid.size
    return grid


@pytest.mark.parametrize(
    ("per_process", "sizes", "inside", "expected"),
    [
        ((4, 4), (4, 2), "data", [[0, 0], [0, 0], [1, 1], [1, 1]]),
        ((4, 4), (4, 2), "pipe", [[0, 1], [0, 1], [0, 1], [0, 1]]),
        ((2, 2), (4, 1), "pipe", [[0], [0], [1], [1]]),  # it cannot stay inside
        ((2, 2), (1, 4), "data", [[0, 0, 1, 1]]),
        (
            (1, 1, 1, 1),
            (2, 2),
            "data",
            [[0, 1], [2, 3]],
        ),  # one device each: neighbours along data are neighbours in number
        ((1, 1, 1, 1), (2, 2), "pipe", [[0, 2], [1, 3]]),
        ((6, 6), (3, 4), "data", [[0, 0, 1, 1]] * 3),  # 4 does not divide 6: a process is a block all the same
        ((6, 6), (4, 3), "data", [[0] * 3, [0] * 3, [1] * 3, [1] * 3]),
        ((4, 4), (2, 2), "data", [[0, 0], [1, 1]]),  # two of each
        ((3, 1), (2, 2), "data", [[0, 0], [0, 1]]),  # all that there are
    ],
)
def test_the_process_of_each_device(per_process, sizes, inside, expected):
    grid = made(cpus(*per_process), dict(zip(("pipe", "data"), sizes, strict=True)), inside)
    assert owners(grid).tolist() == expected


def test_further_axes_are_the_innermost_ones():
    for inside in ("data", "pipe"):
        grid = owners(made(cpus(4, 4), {"pipe": 2, "data": 2, "model": 2}, inside))
        assert (grid[..., 0] == grid[..., 1]).all()
        along = grid[:, 0, 0] if inside == "pipe" else grid[0, :, 0]
        assert len(set(along.tolist())) == 1


@given(data=st.data(), processes=st.integers(1, 4), inside=st.sampled_from(["data", "pipe"]))
def test_a_process_is_a_block_whatever_the_sizes(data, processes, inside):
    sizes = {axis: data.draw(st.integers(1, 6), axis) for axis in ("pipe", "data", "model")}
    each, rest = divmod(int(np.prod(list(sizes.values()))), processes)
    if rest or not each:
        return
    grid = owners(made(cpus(*[each] * processes), sizes, inside))
    for process in range(processes):
        places = np.argwhere(grid == process)
        assert np.prod(places.max(0) - places.min(0) + 1) == len(places) == each


@pytest.mark.parametrize("inside", ["data", "pipe"])
def test_with_one_process_the_order_is_that_of_jax(inside, monkeypatch):
    assert list(made(cpus(12), {"pipe": 3, "data": 2}, inside).flat) == cpus(12)[:6]
    real = jax.devices()[:4]
    assert list(jaxpipe.make_mesh(pipe=2, data=2, inside=inside).devices.flat) == real
    monkeypatch.setattr(jax, "devices", lambda: cpus(4, 4))
    crosses = {"data": [[0, 0], [1, 1]], "pipe": [[0, 1], [0, 1]]}[inside]
    assert owners(jaxpipe.make_mesh(pipe=2, data=2, inside=inside).devices).tolist() == crosses
    mesh = jaxpipe.make_mesh(pipe=2, data=2, inside=inside, devices=real)
    assert list(mesh.devices.flat) == real, "devices that are given stay in their order"


@pytest.mark.parametrize(
    ("per_process", "needed", "message"),
    [
        ((4, 4), 3, "3 of 8 devices in 2 processes are needed: .* equally many of them, and 2 does not divide 3"),
        ((2, 2, 2), 2, "all processes must have a part, and some would have none"),
        ((5, 1), 4, "equally many of them, 2, and one has 1 only"),
    ],
)
def test_all_processes_have_equally_many(per_process, needed, message, monkeypatch):
    with pytest.raises(MeshError, match=message):
        choose(cpus(*per_process), needed)
    monkeypatch.setattr(jax, "devices", lambda: cpus(*per_process))
    with pytest.raises(MeshError, match=message):
        jaxpipe.make_mesh(pipe=needed)


# ------------------------------------------------------------------------------------------------------------- TPU


def longest(grid, axis=0):
    """The length of the longest step between neighbours along an axis, in links between chips."""
    coords = np.asarray([device.coords for device in grid.flat]).reshape(*grid.shape, 3)
    return np.abs(np.diff(coords, axis=axis)).sum(-1).max(initial=0)


@pytest.mark.parametrize("inside", ["data", "pipe"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("TPU v5 lite", (4, 4, 1)), ("TPU v5 lite", (2, 4, 1)), ("TPU v5", (4, 4, 4))], ids=str
)
def test_neighbours_on_pipe_are_neighbours_on_the_torus(kind, shape, inside):
    devices = chips(shape, kind=kind)
    worse = 0
    for pipe in (2**n for n in range(1, 7) if len(devices) % 2**n == 0):
        for model in (1, 2) if pipe < len(devices) else (1,):
            sizes = {"pipe": pipe, "data": len(devices) // pipe // model, "model": model}
            assert longest(made(devices, sizes, inside)) == 1, sizes
            plain = np.asarray(devices, dtype=object).reshape(tuple(sizes.values()))
            worse += longest(plain) > 1
    assert worse, "the order of jax.devices() would do as well"


def test_both_axes_are_short_where_the_torus_has_their_shape():
    grid = made(chips((4, 4, 4)), {"pipe": 16, "data": 4})
    assert longest(grid, 0) == longest(grid, 1) == 1


def test_slices_are_crossed_on_one_axis():
    for inside, crossed in (("data", 0), ("pipe", 1)):
        grid = made(chips((4, 4, 1), slices=2), {"pipe": 4, "data": 8}, inside)
        slices = np.vectorize(lambda device: device.slice_index, otypes=[int])(grid)
        assert (np.diff(slices, axis=1 - crossed) == 0).all()
        assert slices.take(0, axis=1 - crossed).tolist() == [0] * (grid.shape[crossed] // 2) + [1] * (
            grid.shape[crossed] // 2
        )
        steps = [longest(half) for half in np.split(grid, 2, axis=crossed)]
        assert steps == [1, 1], "inside a slice"


def test_a_shape_that_is_refused_gets_the_plain_order(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError

    holes = [chips((4, 4, 1))[n] for n in (0, 5, 10, 15)]  # no box
    assert list(made(holes, {"pipe": 2, "data": 2}).flat) == holes
    monkeypatch.setattr(mesh_utils, "create_device_mesh", refuse)
    devices = chips((2, 2, 1))
    assert list(made(devices, {"pipe": 2, "data": 2}).flat) == devices
