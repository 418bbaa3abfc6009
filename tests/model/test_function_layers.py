"""Layers that are functions: what is handed to them, and what they may return."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.model.blame import Fault
from jaxpipe.model.context import Context
from jaxpipe.model.function_layers import recipe_of_callable, recipe_of_layer
from jaxpipe.model.specs import Layer

X, KEY = jnp.ones(3), jax.random.key(0)


def test_recipe_of_a_pair():
    layer = Layer(lambda key, x: {"w": jnp.float32(2)}, lambda p, x, key, train=False: (p["w"] * x, key is None, train))
    recipe = recipe_of_layer("given", layer)
    assert recipe.name == "given" and recipe_of_layer("given", Layer(layer.init, layer.apply, "Own")).name == "Own"
    kind = recipe.adapt()
    assert kind.uses_key
    (y, no_key, train), _ = kind.apply(kind.init(KEY, X), X, Context(), True)
    assert (y == 2).all() and no_key and train
    assert not kind.apply(kind.init(KEY, X), X, Context(KEY), False)[0][2]
    other = recipe_of_layer("given", layer, forward_fn=lambda p, x: x - p["w"])
    assert (
        other.adapt().apply({"w": jnp.float32(2)}, X, Context(), True)[0] == -1
    ).all() and other.source != recipe.source


def test_recipe_of_a_function():
    def drop(x, deterministic=True, *, key=None):
        return x * (1.0 if deterministic else 0.0)

    kind = recipe_of_callable(drop).adapt()
    assert kind.init(KEY, X) == {} and kind.uses_key
    assert (kind.apply({}, X, Context(KEY), True)[0] == 0).all()
    assert (kind.apply({}, X, Context(KEY), False)[0] == 1).all() and (
        kind.apply({}, X, Context(), True)[0] == 1
    ).all(), "no key, no dropout"
    assert (
        recipe_of_callable(functools.partial(drop)).name == "drop" and recipe_of_callable(lambda x: x).name == "lambda"
    )
    assert recipe_of_callable(jnp.tanh).source[1] is jnp.tanh


def test_a_pair_with_state():
    def init(key, x):
        return {"w": jnp.float32(2)}, {"seen": jnp.float32(0), "table": jnp.ones(3)}

    def apply(params, state, x, *, train, key=None):
        assert key is None
        return params["w"] * x + state["seen"], {"seen": state["seen"] + (1 if train else 100), "table": state["table"]}

    kind = recipe_of_layer("given", Layer(init, apply, stateful=True)).adapt()
    assert kind.uses_key and kind.init(KEY, X) == {"w": 2}
    state = kind.init_state(KEY, X)
    y, aux = kind.apply(kind.init(KEY, X), X, Context(None, state), True)
    assert (y == 2).all() and aux.state["seen"] == 1 and aux.state["table"] is state["table"]
    y, aux = kind.apply(kind.init(KEY, X), X, Context(None, aux.state), False)
    assert (y == 3).all() and aux.state["seen"] == 1, "an evaluation changes nothing"
    assert (
        recipe_of_layer("given", Layer(init, apply, stateful=True)).source
        != recipe_of_layer("given", Layer(init, apply)).source
    )


@pytest.mark.parametrize(
    ("init", "apply", "message"),
    [
        (lambda k, x: {"w": 1.0}, None, r"init returns \(params, state\), but it returned a dict"),
        (lambda k, x: ({}, {}), lambda p, s, x: x, r"apply returns \(y, new state\), but it returned a "),
        (lambda k, x: ({}, {}), lambda p, s, x: (x, s, s), "returned a tuple of 3"),
        (lambda k, x: ({}, {"k": jax.random.key(0)}), None, "the PRNG key 'k' in its state"),
    ],
)
def test_a_pair_with_state_that_returns_something_else(init, apply, message):
    kind = recipe_of_layer("given", Layer(init, apply or (lambda p, s, x: (x, s)), stateful=True)).adapt()
    with pytest.raises(Fault, match=message):
        kind.apply(kind.init(KEY, X), X, Context(None, kind.init_state(KEY, X)), True)


def test_a_pair_with_state_that_takes_none():
    layer = Layer(lambda k, x: ({}, {}), lambda params, x: x, stateful=True)
    with pytest.raises(Fault, match=r"called as apply\(params, state, x\), but its function takes less"):
        recipe_of_layer("given", layer).adapt()


def test_a_pair_with_state_and_a_cache():
    def apply(params, state, x, *, cache=None, position=None):
        return (x if cache is None else (x + cache, cache + 1)), {"n": state["n"] + 1}

    kind = recipe_of_layer(
        "given", Layer(lambda k, x: ({}, {"n": X}), apply, stateful=True, init_cache=jnp.full)
    ).adapt()
    assert kind.knows_position and (kind.init_cache({}, {"n": X}, (3,), 4) == 4).all()
    (y, aux), plain = (
        kind.apply({}, X, Context(None, {"n": X}, cache=X), False),
        kind.apply({}, X, Context(None, {"n": X}), False),
    )
    assert (y == 2).all() and (aux.cache == 2).all() and (plain[0] == 1).all() and plain[1].cache is None
    with pytest.raises(
        Fault, match=r"apply\(params, state, x, cache=..., position=...\) and returns \(\(y, cache\), state\)"
    ):
        bare = Layer(lambda k, x: ({}, {}), lambda params, state, x: (x, state), stateful=True, init_cache=jnp.full)
        recipe_of_layer("given", bare).adapt()
