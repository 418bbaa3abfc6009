"""What results of a traced function depend on, and the function without what a result does not need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.model.loss_weight import depends, without

Y, T = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))


def scanned(y, t):
    """Two sums in one loop."""
    return jax.lax.scan(lambda c, x: ((c[0] + x[0].sum(), c[1] + x[1].sum()), None), (0.0, 0.0), (y, t))[0]


def mixed_in_a_loop(y, t):
    """The second sum takes in the first, one iteration later."""
    return jax.lax.scan(lambda c, x: ((c[0] + x.sum(), c[1] + c[0]), None), (0.0, t.sum()), y)[0]


def long_as_outputs_say(y, t):
    """How often the loop runs depends on the outputs."""
    return y.sum(), jax.lax.while_loop(lambda c: c[0] < y.sum(), lambda c: (c[0] + 1, c[1] + 1), (0.0, t.sum()))[1]


def counted(y, t):
    return y.sum(), jax.lax.fori_loop(0, 3, lambda _, c: c * 2, t.sum())


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda y, t: (y.sum(), t.sum()), [True, False]),
        (lambda y, t: (y.sum(), t.sum() * y.shape[0]), [True, False]),
        (lambda y, t: (y.sum(), jnp.zeros_like(y).sum()), [True, False]),
        (lambda y, t: (1.0 * t.sum(), 0.0), [False, False]),
        (jax.jit(lambda y, t: (y.sum(), t.sum())), [True, False]),
        (jax.checkpoint(lambda y, t: (y.sum(), t.sum())), [True, False]),
        (scanned, [True, False]),
        (mixed_in_a_loop, [True, True]),
        (counted, [True, False]),
        (long_as_outputs_say, [True, True]),
        (lambda y, t: jax.lax.cond(t.sum() > 0, lambda: (y.sum(), t.sum()), lambda: (0.0, 1.0)), [True, False]),
        (lambda y, t: jax.lax.cond(y.sum() > 0, lambda: (1.0, 2.0), lambda: (0.0, 1.0)), [True, True]),
    ],
)
def test_what_depends_on_the_outputs(function, wanted):
    assert depends(jax.make_jaxpr(function)(Y, T), [0]) == wanted


def test_nothing_depends_on_no_inputs():
    assert depends(jax.make_jaxpr(lambda y, t: (y, t))(Y, T), []) == [False, False]
    assert depends(jax.make_jaxpr(lambda y, t: (y, t))(Y, T), [1]) == [False, True]


def test_what_is_not_needed_is_not_run():
    def weight(y, t):
        y = jax.pure_callback(lambda y: pytest.fail("it was called for made-up values"), y, y)
        return (t * y.shape[0]).sum() + 0 * t.size

    shape = jax.ShapeDtypeStruct(Y.shape, Y.dtype)
    np.testing.assert_array_equal(without(weight, shape, T), 12.0)
    np.testing.assert_array_equal(jax.jit(lambda t: without(lambda y, t: scanned(y, t)[1], shape, t))(T), 6.0)
