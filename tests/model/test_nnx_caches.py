"""What modules of flax.nnx keep while they decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.model import nnx_caches


class Block(nnx.Module):
    def __init__(self, dtype=None, *, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.attention(self.linear(x))


def test_modules_that_decode_are_found():
    assert nnx_caches.decodes(Block(rngs=nnx.Rngs(0)))
    assert not nnx_caches.decodes(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("dtype", "given", "wanted"),
    [(None, jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32, jnp.bfloat16)],
)
def test_empty_caches_have_room_for_the_length_and_the_dtype_of_the_keys(dtype, given, wanted):
    module = Block(dtype, rngs=nnx.Rngs(0))
    nnx_caches.prepare(module, jnp.zeros((3, 1, 4), given), 7)
    found = nnx_caches.values(module)
    assert sorted((leaf.shape, leaf.dtype) for leaf in found if leaf.ndim) == [((3, 7, 2, 2), wanted)] * 2
    with jax.numpy_dtype_promotion("standard"):
        module(jnp.ones((3, 1, 4), given))  # flax refuses another dtype


def test_values_are_put_back_where_they_were():
    module, x = Block(rngs=nnx.Rngs(0)), jnp.ones((1, 1, 4))
    nnx_caches.prepare(module, x, 5)
    module(x)
    kept = nnx_caches.values(module)
    second = module(2 * x)
    nnx_caches.prepare(module, x, 1)
    nnx_caches.put(module, kept)
    np.testing.assert_array_equal(module(2 * x), second)
