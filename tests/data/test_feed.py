"""Batches of one process. Several: tests/contracts/test_processes_data.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.data.feed import Feed, _zeros
from jaxpipe.data.share import Share
from jaxpipe.errors import DataError
from tests.compare import assert_close
from tests.data.micro_batches import item

MESH = jaxpipe.make_mesh(pipe=2, data=2)


def test_a_batch_is_the_next_m_micro_batches():
    items = [item(seed=seed) for seed in range(4)]
    feed, source = Feed(Share(MESH), 2), iter(items)
    for pair in (items[:2], items[2:]):
        fed = feed.next(source)
        assert_close((fed.inputs, fed.labels), jax.tree.map(lambda *a: np.stack(a), *pair), 0)
        assert fed.answer is None and fed.fault is None
        assert all(leaf.sharding.mesh == MESH for leaf in jax.tree.leaves((fed.inputs, fed.labels)))
    with pytest.raises(DataError, match="ended after 0 of 2"):
        feed.next(source)


def test_rows_must_fit_the_data_ranks():
    with pytest.raises(DataError, match="cannot be split evenly over 2 data ranks"):
        Feed(Share(MESH), 1).next(iter([item(3)]))


def test_zeros_stand_for_anything():
    key = jax.random.split(jax.random.key(1), 3)
    for leaf in (jnp.ones((2, 3), jnp.bfloat16), np.ones(4, bool), key):
        like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        made = _zeros(like)
        assert (made.shape, made.dtype) == (like.shape, like.dtype)
