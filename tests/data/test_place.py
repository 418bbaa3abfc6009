"""From the host to the mesh: values, order, and where they lie."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import jaxpipe
from jaxpipe.data.place import group, on_all, put, stack
from jaxpipe.data.share import Share
from jaxpipe.processes.group import Group
from tests.compare import assert_close
from tests.data.micro_batches import item

MESH = jaxpipe.make_mesh(pipe=2, data=2)


def on_host(items):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def test_rows_are_split_over_the_data_ranks():
    items = [item(seed=seed) for seed in range(3)]
    made = stack(items, Share(MESH))
    assert_close(made, on_host(items), 0)
    for leaf in jax.tree.leaves(made):
        assert leaf.sharding.mesh == MESH and leaf.sharding.spec == PartitionSpec(None, "data")


def test_a_mesh_without_a_data_axis_holds_all_rows_everywhere():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("pipe",))
    made = stack([item(), item(seed=1)], Share(mesh))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(made))


def test_arrays_from_other_devices():
    items = [item(seed=seed) for seed in range(2)]
    far = [jax.tree.map(lambda a, n=n: jax.device_put(a, jax.devices()[-1 - n]), one) for n, one in enumerate(items)]
    for mixed in (far, [far[0], items[1]], [jax.tree.map(jnp.asarray, items[0]), far[1]]):
        assert_close(stack(mixed, Share(MESH)), on_host(items), 0)


def test_neighbours_of_one_shape_are_together():
    rows = [4, 4, 3, 4, 2, 2]
    assert [len(alike) for alike in group([item(n) for n in rows])] == [2, 1, 1, 2]
    batches = put([item(n, seed=n) for n in rows], Share(MESH))
    assert [batch[0]["h"].shape[:2] for batch in batches] == [(2, 4), (1, 3), (1, 4), (2, 2)]
    # Three rows cannot be split over two data ranks: they stay on the host, to be cut further.
    assert [isinstance(batch[0]["h"], jax.Array) for batch in batches] == [True, False, True, True]
    assert_close(batches[1], on_host([item(3, seed=3)]), 0)


def test_whole_batches_for_a_step_of_several_processes(monkeypatch):
    keys = jax.random.split(jax.random.key(0), (2, 4))
    tree = {
        "numpy": np.arange(24).reshape(2, 4, 3),
        "jax": jax.device_put(jnp.ones((2, 4)), jax.devices()[9]),
        "keys": keys,
    }
    assert on_all(tree, MESH) is tree, "one process: as it is"
    monkeypatch.setattr(Group, "of", lambda mesh: SimpleNamespace(several=True))
    for name, leaf in on_all(tree, MESH).items():
        assert leaf.sharding.mesh == MESH and leaf.sharding.spec == PartitionSpec(None, "data")
        assert (jax.device_get(leaf) == jax.device_get(tree[name])).all()
    assert jax.jit(lambda a: on_all(a, MESH) + 1)(np.zeros((2, 4))).shape == (2, 4)
