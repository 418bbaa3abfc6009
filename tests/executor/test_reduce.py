"""Sums over devices, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor import reduce
from tests.compare import assert_close

rng = np.random.default_rng(0)


def on(mesh, function, *args):
    """`function` on the devices; `args` and results have a leading dim over all of them, pipe first."""
    spec = P(("pipe", "data"))

    def one(*args):
        made = function(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], made)

    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(*args)


@pytest.mark.parametrize("axes", [("pipe",), ("data",), ("pipe", "data"), ()], ids=str)
def test_totals(axes):
    mesh = jaxpipe.make_mesh(pipe=2, data=3)
    tree = {"a": rng.normal(size=(6, 4)).astype(np.float32), "n": np.arange(6, dtype=np.int32), "none": None}
    found = on(mesh, lambda tree: reduce.total(tree, mesh, *axes), tree)

    def wanted(leaf):
        grid = leaf.reshape(2, 3, *leaf.shape[1:])
        for axis in axes:
            number = ("pipe", "data").index(axis)
            grid = np.broadcast_to(grid.sum(number, keepdims=True), grid.shape)
        return grid.reshape(leaf.shape).astype(leaf.dtype)

    assert_close(found, jax.tree.map(wanted, tree), 1e-6)


def test_axes_of_one_device_need_no_collective():
    mesh = jaxpipe.make_mesh(pipe=1, data=2)
    assert reduce.over(mesh, "pipe", "data", "model") == ("data",)
    assert reduce.total({"a": 3}, mesh, "pipe") == {"a": 3}


@pytest.mark.parametrize("size", [(2, 2), (1, 1)], ids=str)
def test_sums_and_what_stays_apart_in_one_reduction(size):
    mesh = jaxpipe.make_mesh(*size)
    devices = size[0] * size[1]
    sums = {"a": rng.normal(size=(devices, 3)).astype(np.float32), "n": np.arange(devices, dtype=np.int32)}
    other = rng.normal(size=(devices, 2, 2)).astype(np.float32)
    apart = {"big": rng.normal(size=devices).astype(np.float32) - 100, "n": np.arange(devices, dtype=np.int32) - 50}
    places = np.arange(devices, dtype=np.int32)

    def function(sums, other, apart, place):
        return reduce.joined((sums, other), apart, place, mesh, "pipe", "data")

    found_sums, found_other, found_apart = on(mesh, function, sums, other, apart, places)
    for device in range(devices):
        here = functools.partial(jax.tree.map, lambda a, d=device: a[d])
        assert_close(here(found_sums), jax.tree.map(lambda a: a.sum(0, dtype=a.dtype), sums), 1e-6)
        assert_close(here(found_other), other.sum(0), 1e-6)
        assert_close(here(found_apart), apart, 0)
    text = str(
        jax.make_jaxpr(function, axis_env=[("pipe", size[0]), ("data", size[1])])(
            *jax.tree.map(lambda a: a[0], (sums, other, apart, places))
        )
    )
    assert text.count("psum") <= 2 * (devices > 1), "one vector per dtype, however many leaves there are"


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_last_rank_deals_out(ranks):
    """What other ranks have does not matter as long as it is zeros; booleans and keys are dealt too."""
    mesh = jaxpipe.make_mesh(pipe=ranks)
    cards = {"a": rng.normal(size=(ranks, 2)).astype(np.float32), "on": np.arange(ranks) % 2 == 0, "none": None}
    hands = jax.tree.map(lambda a: np.concatenate([np.zeros((ranks - 1, *a.shape), a.dtype), a[None]]), cards)
    assert_close(on(mesh, lambda hand: reduce.deal(hand, mesh), hands), cards, 0)
    keys = jax.random.split(jax.random.key(1), ranks)
    blank = jax.random.wrap_key_data(jnp.zeros((ranks - 1, ranks, 2), jnp.uint32))
    found = on(mesh, lambda hand: reduce.deal(hand, mesh), jnp.concatenate([blank, keys[None]]))
    assert (found == keys).all()


def test_rows_of_the_last_rank_come_to_all():
    """In the order of the data ranks, and as they are: added to the zeros of other ranks, -0.0 would be 0.0."""
    mesh = jaxpipe.make_mesh(pipe=2, data=3)
    values = np.where(rng.random((6, 4, 2, 5)) < 0.5, -0.0, rng.normal(size=(6, 4, 2, 5))).astype(np.float32)
    found = on(mesh, lambda tree: reduce.from_rank(1, tree, mesh), {"a": values, "b": values > 0})
    wanted = np.concatenate(values[3:], axis=1)  # [M, all rows, ...]
    for name, right in {"a": wanted, "b": wanted > 0}.items():
        for device in np.asarray(found[name]):
            assert device.dtype == right.dtype and device.tobytes() == right.tobytes()
    one = jaxpipe.make_mesh()
    assert (on(one, lambda a: reduce.from_rank(0, a, one), values[:1])[0] == values[0]).all()
