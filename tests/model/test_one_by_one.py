"""Chunks given position by position."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.model.one_by_one import one_by_one, with_length


def step(cache, x):
    total = cache + x["a"][:, 0]
    return {"a": total[:, None] * x["scale"], "count": jnp.int32(x["a"].shape[1])}, total


def test_positions_come_in_order_and_what_has_none_is_the_same_for_all():
    x = {"a": jnp.arange(12.0).reshape(2, 3, 2), "scale": jnp.float32(2)}
    y, cache = one_by_one(step, jnp.ones((2, 2)), x)
    np.testing.assert_array_equal(y["a"], 2 * (1 + jnp.cumsum(x["a"], axis=1)))
    np.testing.assert_array_equal(cache, 1 + x["a"].sum(1))
    assert y["count"] == 1
    single = {**x, "a": x["a"][:, :1]}
    np.testing.assert_array_equal(one_by_one(step, jnp.ones((2, 2)), single)[0]["a"], y["a"][:, :1])


def test_losses_beside_the_output_are_dropped():
    def with_loss(cache, x):
        return jaxpipe.LayerOut(x, losses={"z": jnp.float32(1)}), cache

    for length in (1, 3):
        y, _ = one_by_one(with_loss, None, jnp.ones((2, length, 4)))
        assert y.shape == (2, length, 4)


def test_with_length():
    x = {"a": jnp.zeros((2, 3, 4)), "b": jnp.zeros((2, 3), jnp.int32), "c": jnp.zeros(2)}
    made = with_length(x, 7)
    assert {name: leaf.shape for name, leaf in made.items()} == {"a": (2, 7, 4), "b": (2, 7), "c": (2,)}
    assert isinstance(made["b"], jax.ShapeDtypeStruct) and made["b"].dtype == jnp.int32
