"""Fresh weights do not depend on the cut, and no device holds more than its part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.layout.init import init_params
from jaxpipe.layout.layout import Layout
from jaxpipe.model import keys
from tests.compare import assert_close

KEY = jax.random.key(11)
X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def init(key, x):
    assert x.shape[1:] == (4,)
    return {
        "w": jax.random.normal(key, (4, 4)),
        "ids": jax.random.randint(key, (3,), 1, 100),
        "gain": 1.5,
        "none": None,
    }


def apply(p, x):
    return x @ p["w"]


BLOCK = jaxpipe.Layer(init, apply, "Block")
ALONE = jaxpipe.Layer(lambda key, x: {"w": jax.random.normal(key, (4, 4))}, apply, "Alone")


def tie():
    return jaxpipe.TiedLayerSpec("tie", alone)


def alone():
    return ALONE


MODULE = jaxpipe.PipelineModule([tie(), BLOCK, BLOCK, jnp.tanh, BLOCK, tie(), BLOCK])
WANTED = [
    layer.init(keys.init_key(KEY, index), jnp.zeros(X.shape)) if index != 5 else {}
    for index, layer in enumerate(MODULE.layers)
]


@pytest.mark.parametrize(
    ("cuts", "data"), [((0, 7), 1), ((0, 1, 7), 1), ((0, 3, 4, 5, 7), 1), ((0, 3, 7), 3), ((0, 7), 2)], ids=str
)
def test_weights_depend_on_key_and_index_only(cuts, data):
    """Also where they are cut over data ranks, and padded for it."""
    mesh = jaxpipe.make_mesh(pipe=len(cuts) - 1, data=data)
    shapes = MODULE.shapes(X, mesh=mesh)
    layout = Layout(MODULE, cuts, [each.params for each in shapes], mesh.shape, zero_stage=1)
    params = init_params(layout, mesh, KEY, shapes)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))
    assert jax.tree.map(lambda a: a.sharding, params) == layout.shardings(mesh)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), layout.shapes()
    )
    found = jax.device_get(layout.to_layers(params))
    for index, (a, b) in enumerate(zip(found, WANTED, strict=True)):
        assert_close(a, jax.tree.map(np.asarray, jax.tree.map(jnp.float32, b) if index == 0 else b), 1e-7)
    (stack,) = layout.stacks.values()
    whole = np.asarray(params["stacked"]["Block"]["ids"])
    assert whole.shape[:2] == (layout.num_ranks, stack.slots)
    for place in set(np.ndindex(whole.shape[:2])) - set(stack.places.values()):
        assert (whole[place] == 0).all()
    for leaf in jax.tree.leaves(params["stacked"]):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}


def test_a_model_without_weights():
    module = jaxpipe.PipelineModule([jnp.tanh, jnp.sin])
    mesh = jaxpipe.make_mesh(pipe=2)
    shapes = module.shapes(X, mesh=mesh)
    assert init_params(Layout(module, (0, 1, 2), [{}, {}]), mesh, KEY, shapes) == {"stacked": {}, "shared": {}}
