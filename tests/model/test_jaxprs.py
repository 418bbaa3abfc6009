"""Jaxprs: equations wherever they are, bodies, and how many inputs of a scan are what."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.model.jaxprs import CALLS, bodies, equations, opened, scan_counts


def test_equations_of_all_branches():
    traced = jax.make_jaxpr(lambda x: jax.lax.switch(0, [jnp.sin, jnp.cos, jax.jit(jnp.tan)], x))(1.0)
    assert {"sin", "cos", "tan"} <= {equation.primitive.name for equation in equations(traced)}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_call_has_one_body_that_takes_and_returns_the_same(wrap):
    [call] = jax.make_jaxpr(wrap(lambda x, y: (jnp.sin(x), y)))(1.0, 2.0).jaxpr.eqns
    assert call.primitive.name in CALLS
    [body] = bodies(call)
    assert len(body.invars) == len(call.invars) and [e.primitive.name for e in body.eqns] == ["sin"]
    assert opened(body) is body and opened(3) == 3


@pytest.mark.parametrize("length", [1, 3])
def test_inputs_of_a_scan(length):
    def scan(a, b, carry, more, x):
        def step(carries, x):
            return (carries[0] * a + x, carries[1] + b), x * a

        return jax.lax.scan(step, (carry, more), x)

    x = jnp.ones((length, 2))
    traced = jax.make_jaxpr(scan)(x[0], x[0], x[0], x[0], x)
    [equation] = [e for e in traced.jaxpr.eqns if e.primitive.name == "scan"]
    assert scan_counts(equation) == (2, 2)
