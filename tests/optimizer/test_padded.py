"""Padding goes through elementwise equations, and nothing else ever sees it."""

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.optimizer import padded
from jaxpipe.optimizer.trace import Trace

LONG, OWN = (8, 5), (7, 5)
rng = np.random.default_rng(0)
A, B = (rng.uniform(0.1, 0.9, size=OWN).astype(np.float32) for _ in range(2))


def spoiled(array):
    """With padding in which every number is wrong."""
    return jnp.full(LONG, jnp.nan).at[:7].set(array)


def equations(function, *arrays):
    """The equations of a trace, of which the values have no home."""
    closed = jax.make_jaxpr(function)(*arrays)
    none = [None] * len(arrays)
    return Trace(closed, none, none, [None] * len(closed.out_avals))


def run(function, arrays, stored):
    """The outputs and the shapes of everything that was computed, from arrays that are stored with padding or without."""
    trace = equations(function, *arrays)
    known, shapes = dict(zip(trace.inputs, stored, strict=True)), []
    for eqn in trace.equations:
        operands = [v.constant if v.constant is not None else known[v] for v in eqn.inputs]
        known.update(zip(eqn.outputs, padded.compute(eqn, operands), strict=True))
        shapes += [(eqn.primitive.name, known[v].shape) for v in eqn.outputs]
    return [padded.fitted(known[v], v.aval.shape) for v in trace.outputs], shapes


def adam(g, m):
    m = 0.9 * m + 0.1 * g
    return m / (jnp.sqrt(jnp.abs(m)) + 1e-8), jnp.where(m > 0.2, m, jnp.clip(g, 0.0, 0.5)).astype(jnp.bfloat16)


def test_what_is_elementwise_runs_with_padding():
    found, shapes = run(adam, (A, B), (spoiled(A), spoiled(B)))
    for a, b in zip(found, adam(A, B), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
    assert {shape for name, shape in shapes if shape and name != "broadcast_in_dim"} == {LONG}
    # One operand with padding is enough.
    found, shapes = run(adam, (A, B), (A, spoiled(B)))
    np.testing.assert_allclose(found[0], adam(A, B)[0], rtol=1e-6)
    assert shapes[-1][1] == LONG


OTHERS = {
    "norm": lambda a: a / jnp.sqrt(jnp.sum(a * a)),
    "sum of rows": lambda a: a.sum(0),
    "centred": lambda a: a - a.mean(1, keepdims=True),
    "largest": lambda a: a.max() + a.min(axis=0),
    "product": lambda a: (a.T @ a, jnp.linalg.norm(a, axis=0)),
    "cumsum": lambda a: jnp.cumsum(jnp.flip(a, 0), 0),
    "argmax": jnp.argmax,
    "reshaped": lambda a: a.reshape(5, 7) * jnp.float32(2),
    "twice": lambda a: jnp.concatenate([a, a]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_sees_it(name):
    function = OTHERS[name]
    found, _ = run(function, (A,), (spoiled(A),))
    for a, b in zip(found, jax.tree.leaves(function(A)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def test_sums_are_of_parts():
    """The array is not put together: the equation takes it with padding, which is zeros."""
    (eqn,) = equations(lambda a: jnp.sum(a, 0), A).equations
    assert padded.form(eqn, [LONG]) == LONG and padded.form(eqn, [OWN]) is None
    assert not np.isnan(padded.operand(eqn, 0, spoiled(A), LONG)).any()
    (eqn,) = equations(jnp.flip, A).equations
    assert padded.form(eqn, [LONG]) is None


def test_zeros_in_the_padding():
    assert padded.zeroed(A, OWN) is A
    np.testing.assert_array_equal(padded.zeroed(spoiled(A), OWN), np.pad(A, ((0, 1), (0, 0))))


def test_the_primitives_exist():
    assert [name for name in sorted(padded.ELEMENTWISE) if not hasattr(primitives, f"{name}_p")] == []
