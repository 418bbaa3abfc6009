"""The `shard_map` under training and evaluation: who gets what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor.job import on_every_device, rows_of
from jaxpipe.executor.weights import Weights
from jaxpipe.layout.layout import Layout

BLOCK = jaxpipe.Layer(lambda key, x: {}, lambda p, x: x, "Block")
MODULE = jaxpipe.PipelineModule([BLOCK, BLOCK, jaxpipe.Layer(lambda key, x: {}, lambda p, x: x * 2, "Head")])
LAYERS = [{"w": np.full(1, n, np.float32)} for n in (10, 20)] + [{"w": np.arange(2, dtype=np.float32) + 30}]


@pytest.mark.parametrize("data", [None, 2])
def test_every_device_gets_its_place_its_weights_and_its_rows(data):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("pipe",)) if data is None else jaxpipe.make_mesh(pipe=2, data=data)
    layout = Layout(MODULE, (0, 1, 3), LAYERS)
    params = layout.from_layers(mesh, LAYERS)
    batch = jnp.arange(24.0).reshape(3, 4, 2), None

    def work(device, held, inputs, labels, other):
        assert labels is None and inputs.shape == (3, 4 // (data or 1), 2)
        found = {
            "place": jnp.stack(device),
            "block": held["stacked"]["Block"]["w"].ravel(),
            "head": held["owned"]["vector: float32"],
            "first": inputs[0, 0],
            "other": other,
        }
        return jax.tree.map(lambda a: a[None], found)

    every = P(tuple(mesh.axis_names))
    others = np.asarray([5, 6])[: data or 1]
    found = on_every_device(work, Weights(layout, mesh), params, batch, others, specs=(rows_of(mesh),), out_specs=every)
    ranks, data_ranks = np.divmod(np.arange(mesh.size), data or 1)
    np.testing.assert_array_equal(found["place"], np.stack([ranks, data_ranks], 1))
    np.testing.assert_array_equal(found["block"].ravel(), np.asarray([10, 20])[ranks])
    np.testing.assert_array_equal(
        found["head"], np.asarray([[0, 0], [30, 31]])[ranks], "the last rank has the head alone"
    )
    np.testing.assert_array_equal(found["first"], np.asarray([[0, 1], [4, 5]])[data_ranks])
    np.testing.assert_array_equal(found["other"].ravel(), others[data_ranks])
