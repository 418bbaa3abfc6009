"""Equations that hold whole jaxprs: taken apart they compute the same."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.optimizer.calls import masked_while, taken_apart


def find(function, name, *args):
    [eqn] = [eqn for eqn in jax.make_jaxpr(function)(*args).jaxpr.eqns if eqn.primitive.name == name]
    return eqn


@pytest.mark.parametrize("which", [-3, 0, 1, 2, 7])
def test_a_conditional_taken_apart_gives_the_same(which):
    def choose(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: 2 * x, lambda x: x * x], x)

    closed = jax.make_jaxpr(choose)(jnp.int32(0), jnp.ones(3))
    eqn = next(e for e in closed.jaxpr.eqns if e.primitive.name == "cond")
    inner = taken_apart(eqn, joins=True)
    assert taken_apart(eqn, joins=False) is None
    x = jnp.arange(3.0)
    index = jnp.clip(which, 0, 2)
    found = jax.extend.core.jaxpr_as_fun(inner)(index, x)
    np.testing.assert_array_equal(found[0], choose(which, x))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_short_scan_taken_apart_gives_the_same(reverse):
    def summed(x, ys):
        return jax.lax.scan(lambda c, y: (c * 0.5 + y, c), x, ys, reverse=reverse)

    x, ys = jnp.float32(3), jnp.arange(5.0)
    inner = taken_apart(find(summed, "scan", x, ys), joins=True)
    found = jax.extend.core.jaxpr_as_fun(inner)(x, ys)
    for a, b in zip(found, summed(x, ys), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_long_scan_stays_whole():
    eqn = find(lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, length=100)[0], "scan", jnp.ones(3))
    assert taken_apart(eqn, joins=True) is None


def test_a_loop_that_is_not_wanted_does_nothing():
    eqn = find(lambda x: jax.lax.while_loop(lambda c: c < 10, lambda c: c + 1, x), "while", jnp.int32(0))
    assert masked_while(eqn.params, True, jnp.int32(0)) == [10]
    assert masked_while(eqn.params, False, jnp.int32(0)) == [0]
