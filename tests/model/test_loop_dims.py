"""Which dims come from loops."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.model.loop_dims import loop_dims

X = np.ones((2, 3), np.float32)


def test_dims_of_loops_are_found_whatever_is_around_them():
    def body(carry, x):
        inner = jax.lax.scan(lambda c, each: (c, jnp.outer(each, each)), 0.0, jnp.stack([x] * 4))[1]
        return carry + x, (x.sum(), inner, jnp.float32(1), carry)

    @jax.jit
    def run(x):
        last, given = jax.lax.scan(jax.checkpoint(body), x[0], x)
        return last, given, given[0].astype(jnp.int32), jnp.moveaxis(given[1], 1, -1), given[0] + 1, x

    loops = (), (0,), (0, 1), (0,), (0,), (0,), (0, 3), (), ()  # what is computed of such values is none of them
    assert loop_dims(run, X) == list(loops)
