"""Functions that are traced once: they give the same, and it is known where their results come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.model.capture import Source, capture
from jaxpipe.model.shapes import avals
from tests.compare import assert_close

TABLE = np.arange(3, dtype=np.float32) + 0.5


def test_where_results_come_from():
    """Arguments as they are, computed values, literals, constants from outside; what occurs twice is one value."""

    def function(params, x, key):
        double, squared = x["h"] * 2, params["w"] ** 2
        return {
            "a skipped": x["h"] + 1,
            "b argument": x["ids"],
            "c computed": double,
            "d key": key,
            "e literal": 2.0,
            "f closed": jnp.asarray(TABLE),
            "g computed": squared,
            "h twice": double,
            "i argument twice": x["ids"],
            "j none": None,
        }

    args = {"w": jnp.ones(3)}, {"h": jnp.ones(2), "ids": jnp.arange(4)}, jax.random.key(3)
    found = capture(function, *avals(args)).sources(1)
    *others, closed = [*found[:4], *found[5:], found[4]]
    literal = others.pop(3)
    assert others == [
        Source(argument=2),
        Source(computed=0),
        Source(argument=3),
        Source(computed=1),
        Source(computed=0),
        Source(argument=2),
    ]
    assert literal.argument is None and literal.computed is None and literal.constant == 2.0
    assert closed.argument is None and closed.computed is None
    np.testing.assert_array_equal(closed.constant, TABLE)


def test_numbers_of_computed_values_begin_where_sources_do():
    captured = capture(lambda x: (x + 1, x + 2, x + 1.5), *avals((jnp.ones(2),)))
    assert captured.sources(0) == [Source(computed=0), Source(computed=1), Source(computed=2)]
    assert captured.sources(2) == [Source(computed=0)]
    assert captured.sources(3) == []


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_calls_like_the_function_and_runs_it_once(wrap):
    calls = []

    def function(x, key, table):
        calls.append(1)
        noise = jax.random.normal(key, x["h"].shape)
        return x["h"] * noise + table, {"ids": x["ids"] + 1, "none": None, "key": jax.random.fold_in(key, 2)}

    args = {"h": jnp.arange(3.0), "ids": jnp.arange(2), "none": None}, jax.random.key(4), jnp.asarray(TABLE)
    captured = capture(function, *avals(args))
    h, rest = wrap(captured)(*args)
    wrap(captured)(*args)
    assert calls == [1]
    wanted_h, wanted = function(*args)
    assert rest["none"] is None and (rest["key"] == wanted["key"])
    assert_close((h, rest["ids"]), (wanted_h, wanted["ids"]), 1e-7)
    assert captured.outputs[0] == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert jax.tree.structure(captured.outputs) == jax.tree.structure((wanted_h, wanted))


@jax.custom_vjp
def odd(x):
    return x * x


@jax.custom_jvp
def other(x):
    return x * 3


odd.defvjp(lambda x: (odd(x), x), lambda x, dy: (dy * 100 * x,))
other.defjvp(lambda primals, tangents: (other(*primals), tangents[0] * 7))


@pytest.mark.parametrize(
    "function", [odd, other, jax.checkpoint(odd), jax.jit(other)], ids=["vjp", "jvp", "checkpoint", "jit"]
)
def test_derivatives_that_users_have_written_stay(function):
    x = jnp.asarray([1.0, -2.0])
    captured = capture(function, *avals((x,)))
    wanted = jax.grad(lambda x: function(x).sum())(x)
    assert abs(wanted[0]) in (7, 100)
    assert_close(jax.grad(lambda x: captured(x).sum())(x), wanted, 0)
