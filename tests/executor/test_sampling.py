"""The choice of a token: likely, random, among the best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.executor.sampling import Sampling

ROWS, VOCAB = 4000, 5
LOGITS = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.25, 0.05]))


def chosen(sampling, temperature=1.0, number=0, key=3, rows=ROWS, logits=LOGITS):
    every = jnp.broadcast_to(logits, (rows, VOCAB))
    numbers = jnp.arange(rows, dtype=jnp.int32)
    key = jax.random.key(key) if isinstance(key, int) else key
    return np.asarray(sampling.choose(every, jnp.float32(temperature), key, numbers, jnp.int32(number)))


def test_greedy_takes_the_most_likely_and_the_first_of_equals():
    assert (chosen(Sampling(), rows=3) == 1).all()
    assert (chosen(Sampling(), rows=3, logits=jnp.asarray([0.0, 2, 2, 1, 0])) == 1).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    found = np.bincount(chosen(Sampling(greedy=False), temperature), minlength=VOCAB) / ROWS
    np.testing.assert_allclose(found, jax.nn.softmax(LOGITS / temperature), atol=0.03)


def test_top_k_draws_among_the_best_in_their_proportion():
    found = np.bincount(chosen(Sampling(greedy=False, top_k=2)), minlength=VOCAB) / ROWS
    np.testing.assert_allclose(found, np.asarray([0, 0.4, 0, 0.25, 0]) / 0.65, atol=0.03)
    assert (chosen(Sampling(greedy=False, top_k=1), rows=5) == 1).all()


def test_a_row_draws_alone():
    sampling = Sampling(greedy=False)
    whole = chosen(sampling, rows=64)
    np.testing.assert_array_equal(chosen(sampling, rows=10), whole[:10])
    assert (chosen(sampling, rows=64, number=1) != whole).any() and (chosen(sampling, rows=64, key=4) != whole).any()


def test_keys_of_other_generators_too():
    sampling, key = Sampling(greedy=False), jax.random.key(3, impl="rbg")
    whole = chosen(sampling, rows=32, key=key)
    np.testing.assert_array_equal(chosen(sampling, rows=7, key=key), whole[:7])
    assert len(set(whole)) > 2
