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
from jaxpipe.processes.rounds import Answer
from jaxpipe.training.loss_scale import DynamicScale
from jaxpipe.training.optimizer import make_step
from jaxpipe.training.state import make_state
from tests.compare import assert_close
from tests.optimizer.layouts import layout, mesh, random_params, tree


@functools.cache
def layerwise():
    shapes = layout().shapes()
    return Layerwise(checked(optax.sgd(0.5, 0.9)), layout(), mesh(), shapes, {})


def step_of(clipping=None, loss=None, loss_scale=None):
    """A step whose gradient is `inputs`, and whose loss is `labels`, or what `loss` says of the key."""

    def value_and_grad(params, inputs, labels, key, scale, layer_state):
        assert (scale is None) == (loss_scale is None)
        return StepResult(labels if loss is None else loss(key), inputs, {})

    return jax.jit(make_step(value_and_grad, layerwise(), clipping, loss_scale))


def start(scaling=None):
    return make_state(random_params(), layerwise(), jax.random.key(5), mesh(), scaling)[0]


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


def test_a_dynamic_scale_learns_from_steps_that_change_nothing_else():
    rule = DynamicScale(initial=4.0, window=2, minimum=2.0)
    step, state = step_of(loss_scale=rule), start(rule)
    seen = []
    for loss in (1.0, np.inf, np.nan, 1.0, 1.0, 1.0):
        state, info = step(state, GRADS, jnp.float32(loss))
        seen.append((int(state.step), float(info.loss_scale), bool(info.at_floor), float(state.loss_scale.scale)))
    assert seen == [
        (1, 4, False, 4),
        (1, 4, False, 2),
        (1, 2, True, 2),
        (2, 2, True, 2),
        (3, 2, True, 4),
        (4, 4, False, 4),
    ]
    assert set(info.metrics()) == {"loss", "grad_norm", "loss_scale"} and info.metrics()["loss_scale"] == 4
    # What processes have refused is no overflow.
    answer = Answer(jnp.zeros((1, 2), jnp.int32), jnp.bool_(False))
    after, info = step(state, GRADS, jnp.float32(np.inf), answer)
    assert not info.finite
    assert_close(after.loss_scale, jax.device_get(state.loss_scale), 0)


def test_a_fixed_scale_is_told_and_not_kept():
    state, info = step_of(loss_scale=8.0)(start(), GRADS, jnp.float32(1))
    assert info.metrics()["loss_scale"] == 8 and info.at_floor is None and state.loss_scale is None


def test_every_step_has_a_key_of_its_own():
    step = step_of(loss=jax.random.uniform)
    state, first = step(start(), GRADS, None)
    _, second = step(state, GRADS, None)
    wanted = [jax.random.uniform(jax.random.fold_in(jax.random.key(5), number)) for number in (0, 1)]
    assert [first.loss, second.loss] == wanted
