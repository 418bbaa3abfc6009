"""Generation over the whole window, with logits from a plain function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.executor.generate_plan import Request
from jaxpipe.executor.sampling import Sampling
from jaxpipe.executor.whole_window import recompute

VOCAB = 11


def sums(ids):
    """The next token is the sum of all so far, modulo the vocabulary."""
    return jax.nn.one_hot(jnp.cumsum(ids, axis=-1) % VOCAB, VOCAB)


def run(outputs, stop=None):
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 3, 4)), jnp.int32)
    request = Request(6, 4, 5, Sampling(stop=stop))
    numbers = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    return np.asarray(prompts), recompute(
        outputs, request, VOCAB, (prompts, numbers), jnp.float32(1), jax.random.key(0)
    )


@pytest.mark.parametrize("stop", [None, 3])
def test_each_token_sees_those_before_it(stop):
    prompts, found = run(sums, stop)
    assert bool(found.causal)
    rows = prompts.reshape(6, 4)
    for row, made in zip(rows, np.asarray(found.tokens).reshape(6, 5), strict=True):
        ids = list(row)
        for _ in range(5):
            ids.append(stop if stop is not None and stop in ids[4:] else sum(ids) % VOCAB)
        assert ids[4:] == list(made)
    if stop is not None:
        assert (np.asarray(found.tokens) == stop).any()


def test_what_stands_behind_is_looked_at():
    _, found = run(lambda ids: sums(ids) + 0.5 * ids.sum(axis=-1)[..., None, None].astype(jnp.float32))
    assert not bool(found.causal)
