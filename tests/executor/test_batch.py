"""Batches with leaves [M, B, ...]."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor.batch import batch_specs, micro_batch_avals, pick

TREE = {
    "x": np.zeros((3, 8, 5)),
    "ids": np.zeros((3, 8), np.int64),
    "none": None,
    "keys": jax.random.split(jax.random.key(0), (3, 8)),
}


def test_shapes_of_one_micro_batch_on_one_data_rank():
    found = micro_batch_avals(TREE, jaxpipe.make_mesh(pipe=2, data=4))
    assert found["x"] == jax.ShapeDtypeStruct((2, 5), jnp.float32) and found["ids"] == jax.ShapeDtypeStruct(
        (2,), jnp.int32
    )
    assert found["none"] is None and found["keys"].shape == (2,) and found["keys"].dtype == TREE["keys"].dtype
    only_pipe = Mesh(np.asarray(jax.devices()[:2]), ("pipe",))
    assert micro_batch_avals(TREE, only_pipe)["x"].shape == (8, 5)
    assert micro_batch_avals(found["x"], only_pipe) == jax.ShapeDtypeStruct((5,), jnp.float32), "of abstract values too"


def test_rows_lie_on_the_data_ranks_if_there_is_such_an_axis():
    assert batch_specs({"x": 1, "none": None}, jaxpipe.make_mesh(pipe=2)) == {"x": P(None, "data"), "none": None}
    assert batch_specs({"x": 1}, Mesh(np.asarray(jax.devices()[:2]), ("pipe",))) == {"x": P()}


def test_picks_one_micro_batch():
    batch = {"x": jnp.arange(12.0).reshape(3, 4), "none": None, "keys": jax.random.split(jax.random.key(0), 3)}
    for m in range(3):
        found = pick(batch, jnp.int32(m))
        assert (found["x"] == batch["x"][m]).all() and found["keys"] == batch["keys"][m] and found["none"] is None
