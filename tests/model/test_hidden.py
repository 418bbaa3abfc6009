"""Modules that callables hide."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from jaxpipe.model.hidden import find_built

BUILT = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
BOUND = linen.Dense(3).bind(linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 3))))


class Holder:
    def __init__(self, module):
        self.parts = {"inner": [module]}

    def __call__(self, x):
        return self.parts["inner"][0](x)


def closed_over(module):
    return lambda x: module(x)


@pytest.mark.parametrize(
    ("entry", "how"),
    [
        (BUILT, ""),
        (BUILT.__call__, "a bound method"),
        (functools.partial(BUILT), "in a functools.partial"),
        (closed_over(BUILT), "as 'module'"),
        (closed_over([BOUND]), "as 'module', in a container"),
        (lambda x: BUILT(x), "as 'BUILT'"),
        (lambda x, m=BUILT: m(x), "in a default"),
        (Holder(BUILT), "its attribute 'parts', in a container, in a container"),
    ],
    ids=range(8),
)
def test_found(entry, how):
    module, found = find_built(entry)
    assert module in (BUILT, BOUND) and found == how


def test_found_behind_jit():
    found = find_built(jax.jit(closed_over(BUILT)))
    assert found is not None and found[0] is BUILT


def test_not_found():
    for entry in (
        nnx.relu,
        lambda x: jnp.tanh(x),
        closed_over(linen.Dense(3)),
        functools.partial(jnp.clip, min=0),
        3,
        None,
    ):
        assert find_built(entry) is None
