"""What may be passed as an optimizer, and how its errors are told."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxpipe.errors import ConfigError, LayerError
from jaxpipe.optimizer.arguments import SlowWeights, calling, checked, explaining, fitted, plain_numpy_rules
from tests.optimizer.optimizers import only_init

PARAMS = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (None, "optimizer=None is no optax gradient transformation. Pass one, such as optax.adam"),
        (1e-3, r"optimizer=0.001 .* It is a number.*optax.adam\(0.001\)"),
        (optax.lion, r"has to be called, as in optax.lion\(1e-3\)"),
        (lambda step: 0.1, r"has to be called, as in optax.adam\(1e-3\), and a learning rate schedule goes into one"),
        (optax.MultiSteps, "is no optax gradient transformation"),
        (only_init(), r"needs the functions init\(params\) and update"),
        ([optax.adam(1e-3)], "is no optax gradient transformation"),
    ],
)
def test_what_is_no_optimizer(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        checked(optimizer)


def extra(update):
    return checked(optax.GradientTransformationExtraArgs(lambda p: (), update))


def test_an_update_is_called_with_what_it_names():
    given = {"value": 1, "grad": 2}
    plain = optax.GradientTransformation(lambda p: (), lambda updates, state, params=None: (updates, state))
    assert calling(checked(plain), given) == {}
    assert calling(extra(lambda updates, state, params=None, *, value: None), given) == {"value": 1}
    assert calling(extra(lambda updates, state, params, grad: None), given) == {"grad": 2}
    assert calling(extra(lambda updates, state, params=None, **more: None), given) == given


def test_lookahead_keeps_its_slow_weights_itself():
    tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    optimizer, shapes = fitted(checked(tx), PARAMS)
    assert isinstance(shapes, SlowWeights) and shapes.slow == PARAMS
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    for _ in range(2):
        with plain_numpy_rules():
            updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.allclose(params["w"], 0.9) and jnp.allclose(state.slow["w"], 0.9), "half of two steps of a tenth"
    pair = optax.LookaheadParams(PARAMS, PARAMS)
    assert isinstance(fitted(checked(tx), pair)[1], optax.LookaheadState), "pairs are taken as they are"


def test_rules_of_the_users_program_do_not_reach_in():
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)  # this suite is strict
    with plain_numpy_rules():
        assert (jnp.ones((2, 2), jnp.float32) + jnp.ones(2, jnp.int32)).shape == (2, 2)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda g, s, *, value_fn: None, "needs the argument 'value_fn', which a training step cannot give"),
        (lambda g, s, **more: more["obj_fn"], "needs the argument 'obj_fn'"),
    ],
)
def test_arguments_that_a_step_cannot_give(update, message):
    with pytest.raises(ConfigError, match=message), explaining():
        update({}, ())


def test_a_parameter_that_must_be_provided():
    with pytest.raises(ConfigError, match="needs the argument 'value'"), explaining():
        raise ValueError("value must be provided to update")


def test_lookahead_inside_of_another():
    with pytest.raises(ConfigError, match="Put it outside: optax.lookahead"), explaining():
        tx = optax.chain(optax.lookahead(optax.sgd(0.1), 2, 0.5))
        tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}), {"w": jnp.ones(3)})


def test_other_errors_are_the_optimizers_own():
    with pytest.raises(IndexError, match="no such group") as caught, explaining():
        raise IndexError("no such group")
    assert any("inside the optimizer" in note for note in caught.value.__notes__)
    with pytest.raises(LayerError, match="^ours$"), explaining():
        raise LayerError("ours")
