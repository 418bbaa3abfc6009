"""Whether a result is one of the inputs, unchanged, also through calls."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.model.forwarded import origin

A, B = jnp.ones(3), jnp.zeros(3)


@jax.custom_jvp
def custom(a, b):
    return b, a + b


custom.defjvp(lambda primals, tangents: (custom(*primals), custom(*tangents)))


def kept(a):
    """The same numbers, as something else: the body of a loop that hands a module on looks like this."""
    return jax.checkpoint(lambda a: a)(a)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda a, b: (b, a), [1, 0]),
        (lambda a, b: (a + 0, a), [None, 0]),
        (lambda a, b: (jnp.ones(3), 2.0), [None, None]),
        (jax.jit(lambda a, b: (b, a * 2)), [1, None]),
        (jax.checkpoint(lambda a, b: (a * 2, a)), [None, 0]),
        (lambda a, b: jax.jit(lambda x, y: (y, x))(*jax.jit(lambda x, y: (y, x))(a, b)), [0, 1]),
        (lambda a, b: jax.jit(lambda x, y: (y, x))(a * 2, b), [1, None]),
        (custom, [1, None]),
        (lambda a, b: jax.lax.cond(a.sum() > 0, lambda a, b: (a, b), lambda a, b: (b, a), a, b), [None, None]),
        (lambda a, b: jax.lax.cond(a.sum() > 0, lambda a, b: (a, b), lambda a, b: (a, b * 2), a, b), [0, None]),
        (lambda a, b: jax.lax.scan(lambda c, x: (c * x.sum(), kept(x)), a, b), [None, 1]),
        (lambda a, b: jax.lax.scan(lambda c, x: (kept(c), x * 2), a, b), [0, None]),
        (lambda a, b: jax.lax.scan(lambda c, x: ((c[1], c[0]), None), (a, b), length=3)[0], [None, None]),
        (
            lambda a, b: jax.lax.fori_loop(0, a.sum().astype(int), lambda i, c: (kept(c[0]), c[1] * 2), (a, b)),
            [0, None],
        ),
    ],
)
def test_origins(function, wanted):
    traced = jax.make_jaxpr(function)(A, B)
    assert [origin(traced, result) for result in range(2)] == wanted
