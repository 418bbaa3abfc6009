"""Traces as steps: what is inlined, what may run twice, and that running the steps is running the function."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.executor.steps import run, size, trace_of
from jaxpipe.model.capture import capture


def made_of(trace):
    """Per step with an equation of its own, whether it may run twice, by the shapes of its results."""
    return [(step.again, [v.aval.shape for v in step.outputs]) for step in trace.steps]


def test_calls_are_inlined_and_computed_as_before():
    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    def function(x, w):
        y = jax.jit(lambda x: jax.checkpoint(jnp.sin)(x @ w))(x)
        return doubled(y), jnp.zeros(2), x

    args = [jnp.asarray(np.random.default_rng(n).normal(size=(3, 3)), jnp.float32) for n in range(2)]
    trace = trace_of(capture(function, *args).jaxpr)
    assert all(len(step.outputs) == 1 and step.equation is None for step in trace.steps), "no call is left"
    assert len(trace.steps) >= 3
    read = run(trace.steps, {**trace.constants, **dict(zip(trace.inputs, args, strict=True))})
    found, wanted = [read(v) for v in trace.outputs], function(*args)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_only_what_costs_little_may_run_twice():
    def function(x, key):
        product = x @ x
        total, _ = jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(3), x)
        return product, total, jax.random.bits(key, (3,)), jnp.tanh(x), x.reshape(9), jnp.sort(x)

    trace = trace_of(capture(function, jnp.ones((3, 3)), jax.random.key(0)).jaxpr)
    makes = {v: step for step in trace.steps for v in step.outputs}
    product, total, noise, tanh, flat, ordered = (makes[v] for v in trace.outputs)
    assert [step.again for step in (product, total, noise, ordered)] == [None] * 4
    assert tanh.again == 9 and flat.again == 0
    assert total.equation is not None, "a scan may be cut"
    assert size(trace.inputs[0]) == 36 and size(trace.inputs[1]) == 8, "a key is kept as its words"


def test_effects_are_marked():
    trace = trace_of(capture(lambda x: (jax.debug.callback(print, x), x + 1)[1], jnp.ones(2)).jaxpr)
    assert [step.effect for step in trace.steps] == [True, False]
