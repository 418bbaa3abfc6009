"""Derivatives by what is trained."""

import jax.numpy as jnp

from jaxpipe.executor.trained import frozen_numbers, split_trained
from jaxpipe.layout.stages import Part
from jaxpipe.model.kinds import Kind

KIND = Kind(lambda key, x: {}, lambda params, x, context, train: (x, None))


def test_frozen_and_integer_leaves_are_left_out_and_put_back():
    parts = [Part(KIND, 0), Part(KIND, 1, frozen=frozenset({0, 2})), Part(KIND, 2, frozen=frozenset({0}))]
    first = {"a": jnp.ones(2), "n": jnp.arange(2)}
    second = {"a": 2 * jnp.ones(2), "b": 3 * jnp.ones(2), "c": 4 * jnp.ones(2), "n": jnp.arange(2)}
    third = {"a": 5 * jnp.ones(2)}
    leaves, rebuild = split_trained(parts, [first, second, third])
    assert [int(leaf[0]) for leaf in leaves] == [1, 3]
    made = rebuild([10 * leaf for leaf in leaves])
    assert [int(made[0]["a"][0]), int(made[1]["b"][0])] == [10, 30]
    assert made[1]["a"] is second["a"] and made[1]["n"] is second["n"] and made[2]["a"] is third["a"]
    # Among those that have derivatives: first.a, second.a, second.b, second.c, third.a.
    assert frozen_numbers(parts, [first, second, third]) == {1, 3, 4}
