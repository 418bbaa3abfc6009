"""Bytes that a jaxpr holds at once, counted by hand."""

import jax
import jax.numpy as jnp

from jaxpipe.executor import scopes
from jaxpipe.hardware import live
from jaxpipe.hardware.structure import Op

X = jax.ShapeDtypeStruct((10, 10), jnp.float32)
EACH = 400


def peak(function, *args):
    return live.peak(jax.make_jaxpr(function)(*(args or (X,))).jaxpr)


def test_elementwise_work_is_in_place():
    assert peak(lambda x: jnp.sin(jnp.cos(x * 2) + 1)) == EACH


def test_products_need_room_of_their_own():
    assert peak(lambda x: x @ x @ x @ x) == 2 * EACH
    assert peak(lambda x: (x @ x, x @ x + 1)) == 2 * EACH
    assert peak(lambda x: (x @ x) + (x @ x.T) * (x.T @ x)) == 4 * EACH  # two products, a transpose, the third product


def test_what_nobody_needs_is_never_there():
    assert peak(lambda x: jnp.sum(x * 1, axis=0)) == EACH + 40
    assert peak(lambda x: jax.jit(lambda x: (x @ x @ x, x))(x)[1] + 1) == EACH


def test_updates_are_in_place():
    def write(buffer, x):
        return buffer.at[3].set((x @ x)[0])

    buffer = jax.ShapeDtypeStruct((1000, 10), jnp.float32)
    assert peak(write, buffer, X) < 2 * EACH


def test_a_loop_has_its_body_on_top_and_its_carry_in_place():
    def run(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x) @ x, None), x, None, length=9)[0]

    assert peak(run) == 2 * EACH
    assert peak(lambda x: run(x @ x)) == 3 * EACH


def test_work_of_ops():
    @jax.named_scope(scopes.of_op("F", 1))
    def forward(x):
        return x @ x @ x

    @jax.named_scope(scopes.of_op("B", 0))
    def backward(x):
        return x @ x

    def step(x):
        for branch in (forward, backward, forward):
            x = jax.lax.while_loop(lambda x: x[0, 0] < 1, branch, x)
        return x @ x

    assert live.work(jax.make_jaxpr(step)(X)) == {Op("F", 1): 2 * EACH, Op("B", 0): EACH}
