"""The derivative reads its own operands: with other values there, it is the derivative of a function with those."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.executor.pullback import vjp

rng = np.random.default_rng(0)
W, AGAIN = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
X, SCALE = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32), jnp.float32(3.0)
DY = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)


def function(params, x):
    w, scale = params
    return [jnp.sin(x[0] @ w) * scale * jnp.broadcast_to(TABLE, DY.shape)]


TABLE = jnp.asarray(rng.normal(size=4), jnp.float32)


def test_the_same_values_give_the_derivative():
    y, pullback = vjp(function, [W, SCALE], [X], [W, SCALE])
    wanted, wanted_pullback = jax.vjp(function, [W, SCALE], [X])
    np.testing.assert_array_equal(y[0], wanted[0])
    jax.tree.map(np.testing.assert_array_equal, pullback([DY]), wanted_pullback([DY]))


def test_products_with_a_weight_are_transposed_with_the_other_operand():
    @jax.jit  # closes over what it is traced with, as units do
    def both(w, again, x, scale):
        def scaled(params, x):
            return [jnp.sin(x[0] @ params[0]) * scale]

        y, pullback = vjp(scaled, [w], [x], [again])
        return y, pullback([DY])

    (y,), ((dw,), (dx,)) = both(W, AGAIN, X, SCALE)
    inner = DY * SCALE * jnp.cos(X @ W)  # what was computed on the way is that of the first operand
    np.testing.assert_allclose(y, jnp.sin(X @ W) * SCALE, rtol=1e-6)
    np.testing.assert_allclose(dw, X.T @ inner, rtol=1e-5)
    np.testing.assert_allclose(dx, inner @ AGAIN.T, rtol=1e-5)
