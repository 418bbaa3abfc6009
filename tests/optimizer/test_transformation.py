"""The transformation of a hand-written loop: made when it is first used, and refusing what it cannot be given."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.optimizer.transformation import LayerwiseTransformation
from tests.compare import assert_close
from tests.optimizer.layouts import layout, mesh, random_params, tree


def test_the_layout_is_asked_for_when_it_is_needed():
    asked = []

    def late():
        asked.append(1)
        return layout()

    tx = LayerwiseTransformation.of(optax.sgd(0.5), late, mesh())
    assert not asked and isinstance(tx, optax.GradientTransformation)
    state = tx.init(random_params())
    assert asked
    updates, state = tx.update(random_params(1), state, random_params())
    assert_close(tree().read(updates), jax.tree.map(lambda g: -0.5 * g, tree().read(random_params(1))), 1e-6)
    assert tx.natural_state(state) == optax.sgd(0.5).init({})


def test_what_is_no_optimizer_is_refused_before_the_layout_is_known():
    with pytest.raises(ConfigError, match="optimizer=None is no optax"):
        LayerwiseTransformation.of(None, lambda: pytest.fail("asked"), mesh())


def test_functions_of_the_params_are_refused():
    tx = LayerwiseTransformation.of(optax.sgd(0.5), layout, mesh())
    with pytest.raises(
        ConfigError, match="value_fn= is a function of the params, which this optimizer cannot be given"
    ):
        tx.update({}, (), {}, value_fn=jnp.sum)
    with pytest.raises(ConfigError, match="which is no params tree of this pipeline"):
        tx.init({"w": jnp.ones(3)})
