"""One optimizer step: the key, clipping, what is not trained, and steps that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpipe.executor.train import StepResult
from jaxpipe.optimizer.arguments import checked
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.training.optimizer import make_step
from jaxpipe.training.state import make_state
from tests.compare import assert_close
from tests.optimizer.layouts import layout, mesh, random_params, tree


@functools.cache
def layerwise():
    shapes = layout().shapes()
    return Layerwise(checked(optax.sgd(0.5, 0.9)), layout(), mesh(), shapes, {})


def step_of(clipping=None, loss=None):
    """A step whose gradient is `inputs`, and whose loss is `labels`, or what `loss` says of the key."""

    def value_and_grad(params, inputs, labels, key):
        return StepResult(labels if loss is None else loss(key), inputs)

    return jax.jit(make_step(value_and_grad, layerwise(), clipping))


def start():
    return make_state(random_params(), layerwise(), jax.random.key(5), mesh())[0]


GRADS = random_params(1)
NORM = float(np.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(tree().read(GRADS)))))


@pytest.mark.parametrize("clipping", [None, 0.5, 1e6])
def test_clipped_and_moved(clipping):
    before = tree().read(jax.device_get(start().params))
    state, info = step_of(clipping)(start(), GRADS, jnp.float32(2))
    scale = 0.5 * (1 if clipping is None else min(1, clipping / NORM))
    wanted = jax.tree.map(lambda p, g: p - scale * g, before, tree().read(jax.device_get(GRADS)))
    assert_close(tree().read(state.params), wanted, 1e-6)
    assert state.step == 1 and info.loss == 2 and info.finite
    np.testing.assert_allclose(info.grad_norm, NORM, rtol=1e-6, err_msg="before clipping")


def test_integers_stay_as_they_are():
    state, _ = step_of()(start(), GRADS, jnp.float32(2))
    steps = state.params["stacked"]["Block"]["steps"]
    assert steps.dtype == jnp.int32 and (steps == start().params["stacked"]["Block"]["steps"]).all()


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(where, value):
    grads, loss = GRADS, jnp.float32(value)
    if where == "gradient":
        bad = GRADS["shared"]["0_Embed"]["e"].at[0, 0].set(value)
        grads, loss = {**GRADS, "shared": {"0_Embed": {"e": bad}}}, jnp.float32(1)
    state, info = step_of()(start(), grads, loss)
    assert not info.finite and state.step == 0
    before = start()
    assert_close((state.params, state.opt_state), jax.device_get((before.params, before.opt_state)), 0)
    assert (jax.random.key_data(state.key) == jax.random.key_data(before.key)).all()


def test_every_step_has_a_key_of_its_own():
    step = step_of(loss=jax.random.uniform)
    state, first = step(start(), GRADS, None)
    _, second = step(state, GRADS, None)
    wanted = [jax.random.uniform(jax.random.fold_in(jax.random.key(5), number)) for number in (0, 1)]
    assert [first.loss, second.loss] == wanted
