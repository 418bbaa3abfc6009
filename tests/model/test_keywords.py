"""Which layers are handed `key`, `train` and `deterministic`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.model.context import Context
from jaxpipe.model.layers import bind

X = jnp.ones((2, 3))
KEY = jax.random.key(0)
TWO = np.float32(2.0)


def apply(entry, train=True, key=KEY, params=None):
    (layer,) = bind([entry])
    return layer.apply({} if params is None else params, X, Context(key if layer.uses_key else None), train)[0]


def of_layer(function):
    return jaxpipe.Layer(lambda key, x: {}, lambda p, x, **keywords: function(x, **keywords))


def required(x, *, train, deterministic):
    assert train is not deterministic
    return x * (2.0 if train else 3.0)


def by_position(x, train=False, deterministic=True):
    return required(x, train=train, deterministic=deterministic)


def unset(x, train=None, deterministic=np.True_):
    return required(x, train=train, deterministic=bool(deterministic))


class Object:
    def __call__(self, x, train=False):
        return required(x, train=train, deterministic=not train)


@jax.checkpoint
def rematerialised(x, other=None):
    return x * 2.0


@functools.wraps(by_position)
def wrapper(x):
    """Shows the signature of what it wraps, and takes less."""
    return by_position(x, True, False)


STATIC = jax.checkpoint(by_position, static_argnums=(1, 2))
JITTED = jax.jit(by_position, static_argnames=("train", "deterministic"))
PARTIAL = functools.partial(lambda a, x, train: required(x, train=train, deterministic=not train), None)


@pytest.mark.parametrize(
    "function", [required, by_position, unset, Object(), STATIC, JITTED, PARTIAL], ids=itertools.count()
)
def test_flags_are_handed_over(function):
    assert apply(function, train=True)[0, 0] == 2.0
    assert apply(function, train=False)[0, 0] == 3.0


def test_flags_of_a_pair():
    def with_key(params, x, key=None, train=False, deterministic=True):
        assert deterministic is (not train or key is None)
        return x * (2.0 if train else 3.0)

    layer = jaxpipe.Layer(lambda key, x: {}, with_key)
    assert apply(layer)[0, 0] == 2.0 and apply(layer, key=None)[0, 0] == 2.0 and apply(layer, train=False)[0, 0] == 3.0
    tied = jaxpipe.TiedLayerSpec(
        "t", lambda: layer, forward_fn=lambda p, x, *, deterministic: x * (1.0 + deterministic)
    )
    assert apply(tied)[0, 0] == 1.0 and apply(tied, train=False)[0, 0] == 2.0


def scale(x, train=2.5):
    return x * train


def hook(x, key="h"):
    assert key == "h"
    return x


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (scale, 2.5),
        (hook, 1.0),
        (lambda x, deterministic=3: x * deterministic, 3.0),
        (lambda x, train=TWO: x * train, 2.0),
        (functools.partial(by_position, train=True, deterministic=False), 2.0),
        (lambda x, key=5: x * key, 5.0),
        (lambda x, key=False: x * (2.0 if key is False else 0.0), 2.0),
        (rematerialised, 2.0),
        (wrapper, 2.0),
        (lambda train: train * 4.0, 4.0),
    ],
    ids=itertools.count(),
)
def test_other_parameters_of_these_names_are_left_alone(function, wanted):
    assert apply(function, train=False)[0, 0] == wanted
    assert apply(function, train=True)[0, 0] == wanted


def test_numbers_of_these_names_in_a_pair_are_left_alone():
    assert apply(jaxpipe.Layer(lambda key, x: {}, lambda p, x, train=2.5: x * train))[0, 0] == 2.5
    keyed = jaxpipe.Layer(lambda key, x: {}, lambda p, x, key: x * jax.random.uniform(key))
    assert apply(keyed)[0, 0] == jax.random.uniform(KEY)
