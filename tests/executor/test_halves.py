"""A traced function in two halves: the same results bit by bit, and no product twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.executor.halves import Halves
from jaxpipe.model.capture import capture
from tests.executor.random_traces import N, one_by_one, products, random_trace


@pytest.mark.parametrize("seed", range(24))
def test_random_traces_bit_by_bit(seed):
    function, count, rng = random_trace(seed)
    whole = capture(function, *[jax.ShapeDtypeStruct((N, N), jnp.float32)] * count)
    outputs = jax.tree.leaves(whole.outputs)
    results = len(outputs)
    late = [number for number in range(results) if rng.random() < 0.6]
    again = [rng.random() < 0.4 for _ in range(count)]
    halves = Halves(whole, late, again)

    args = [jnp.asarray(a, jnp.float32) for a in np.random.default_rng(seed).normal(size=(count, N, N))]
    wanted = one_by_one(whole.jaxpr, args)
    found = iter(one_by_one(halves._first.jaxpr, args))
    got = {number: next(found) for number in range(results) if number not in late}
    got |= {number: next(found) for number, early in zip(late, halves.early, strict=True) if early}
    pending = list(found)
    assert [(a.shape, a.dtype) for a in pending] == [(a.shape, a.dtype) for a in halves.pending]
    known = [a for a, both in zip(args, again, strict=True) if both]
    found = iter(one_by_one(halves._second.jaxpr, [*known, *pending]))
    got |= {number: next(found) for number, early in zip(late, halves.early, strict=True) if not early}
    for number, leaf in enumerate(wanted):
        np.testing.assert_array_equal(got[number], leaf, f"result {number}")
    assert products(halves._first.jaxpr) + products(halves._second.jaxpr) <= products(whole.jaxpr)


def test_what_crosses_is_little():
    """Of values that cost nothing to make again, the smaller ones; and small results are made at once."""

    def function(w, b, x, dy):
        h = jnp.tanh(x @ w)
        wide = jnp.broadcast_to(dy[:, None], (N, 5, N)) * 2.0
        return {"dx": dy @ w.T, "dw": h.T @ dy, "db": dy.sum(0) * b, "wide": wide}

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, N), (N,), (N, N), (N, N))]
    whole = capture(function, *shapes)  # results in the order of their names: db, dw, dx, wide
    halves = Halves(whole, [0, 1, 3], [True, True, False, False])
    assert halves.early == [False, False, False], "dy crosses anyway, and everything follows from it and from x"
    assert [a.shape for a in halves.pending] == [(N, N), (N, N)]
    halves = Halves(whole, [0], [True, True, False, False])
    assert halves.early == [True] and halves.pending == [], "a bias is smaller than what it is made of"
