"""The state at step 0: whose it is, and where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxpipe.optimizer.arguments import checked
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.training.loss_scale import DynamicScale
from jaxpipe.training.state import make_state
from tests.optimizer.layouts import layout, mesh, random_params


def made(key, scaling=None):
    optimizer = Layerwise(checked(optax.adam(1e-2)), layout(), mesh(), layout().shapes(), {})
    params = random_params()
    return params, *make_state(params, optimizer, key, mesh(), scaling)


def test_it_begins_at_zero_around_the_params():
    params, state, _ = made(jax.random.key(3))
    assert state.step.shape == () and state.step.dtype == jnp.int32 and state.step == 0
    assert state.params is params
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state.opt_state))


def test_every_leaf_lies_where_its_sharding_says():
    _, state, shardings = made(jax.random.key(3), DynamicScale(initial=8.0))
    assert state.loss_scale.scale == 8 and state.loss_scale.skipped == 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert shardings.step.spec == shardings.key.spec == PartitionSpec()
    assert shardings.params["stacked"]["Block"]["w"].spec == PartitionSpec("pipe")


def test_the_key_of_the_caller_lives_on():
    key = jax.random.key(3)
    _, state, _ = made(key)
    state.key.delete()
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(3))).all()


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_the_key_may_lie_on_any_device(make):
    key = jax.device_put(make(3), jax.devices()[-1])
    _, state, _ = made(key)
    assert (
        state.key.dtype == key.dtype and (np.asarray(jax.random.key_data(state.key)) == jax.random.key_data(key)).all()
    )


def test_it_is_a_tree():
    _, state, _ = made(jax.random.PRNGKey(3))
    again = jax.tree.map(lambda leaf: leaf, state)
    assert type(again) is type(state) and again.key.dtype == jnp.uint32, "an older key stays one"


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_state_of_shapes_is_like_the_real_one(make):
    optimizer = Layerwise(checked(optax.adam(1e-2)), layout(), mesh(), layout().shapes(), {})
    params, real, wanted = made(make(3))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    state, shardings = make_state(shapes, optimizer, make(3), mesh())
    assert jax.tree.structure(state) == jax.tree.structure(real) and shardings == wanted
    for found, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(real), strict=True):
        assert isinstance(found, jax.ShapeDtypeStruct)
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
        assert found.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
