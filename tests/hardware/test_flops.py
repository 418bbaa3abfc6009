"""Operations counted in jaxprs, against formulas."""

import jax
import jax.numpy as jnp

from jaxpipe.executor import scopes
from jaxpipe.hardware import flops
from jaxpipe.hardware.flops import Flops
from jaxpipe.hardware.structure import Op


def aval(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def counted(function, *args):
    return flops.count(jax.make_jaxpr(function)(*args))


def test_products():
    assert counted(jnp.matmul, aval(5, 3, 4), aval(5, 4, 7)) == Flops({}, {}, 2 * 5 * 3 * 4 * 7)
    assert counted(lambda a, b: a.T @ b, aval(6, 3), aval(6, 2)).outside == 2 * 6 * 3 * 2


def test_convolutions():
    def convolve(x, w, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    x, each = aval(2, 8, 8, 6), 2 * (2 * 8 * 8 * 12)
    assert counted(convolve, x, aval(3, 3, 6, 12)).outside == each * 3 * 3 * 6
    assert counted(lambda x, w: convolve(x, w, 2), x, aval(3, 3, 3, 12)).outside == each * 3 * 3 * 3


def test_loops_and_branches():
    def step(x):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, jnp.sin, x)

    assert counted(step, aval(4, 4)).outside == (5 + 2) * 2 * 4**3


def test_what_nobody_needs_is_not_counted():
    """XLA drops it, too: what a `jit` inside returns in vain, and a product whose derivative does not look at it."""

    def unused(x):
        return jax.jit(lambda x: (x @ x, x + 1))(x)[1]

    assert counted(unused, aval(4, 4)).outside == 0
    # Forward x @ w, and of the second product only its derivatives: by w, and by its input, then that of w.
    weights = jax.grad(lambda w, x: (jnp.tanh(x @ w) @ w).sum())
    assert counted(weights, aval(4, 4), aval(4, 4)).outside == 4 * 2 * 4**3


def test_ops_and_tails():
    """The same op in two phases is one op; a scan inside counts as often as it runs."""

    def op(kind, times, tail):
        @jax.named_scope(scopes.of_op(kind, 3))
        def run(x):
            x = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=times)[0]
            if tail:
                with jax.named_scope(scopes.TAIL):
                    x = jax.jit(lambda x: x @ x)(x)
            return x

        return lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, run, x)

    def step(x):
        def tick(x):
            for work in (op("F", 2, False), op("B", 6, True), op("F", 2, False)):
                x = work(x)
            return x

        return jax.lax.while_loop(lambda x: x[0, 0] < 5, tick, x) @ x

    each = 2 * 8**3
    found = counted(step, aval(8, 8))
    assert found.ops == {Op("F", 3): 2 * each, Op("B", 3): 7 * each}
    assert found.tail == {Op("F", 3): 0, Op("B", 3): each}
    assert (found.outside, found.shared_tail) == (each, 0)


def test_a_tail_that_all_ranks_share():
    @jax.named_scope(scopes.TAIL)
    def tail(x):
        return x @ x

    assert counted(lambda x: tail(x) @ x, aval(4, 4)) == Flops({}, {}, 128, 128)
