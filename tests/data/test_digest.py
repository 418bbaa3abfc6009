"""Hashes that differ where micro-batches differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.data.digest import PART, PARTS, WHOLE_BATCHES, contents_digests, shapes_digest
from tests.data.micro_batches import item


def test_shapes():
    items = [item(), item(seed=1)]
    assert shapes_digest(items, [4, 4]) == shapes_digest([item(seed=2)] * 2, [4, 4]) >= 0
    others = [
        shapes_digest(items[:1], [4]),
        shapes_digest(items, [8, 8]),
        shapes_digest([(x, None) for x, _ in items], [4, 4]),
        shapes_digest([jax.tree.map(lambda a: a.astype(np.float16), one) for one in items], [4, 4]),
    ]
    assert len({shapes_digest(items, [4, 4]), *others}) == 5


def test_own_rows_have_the_shapes_of_the_whole():
    assert shapes_digest([item(2)], [4]) == shapes_digest([item(4)], [4])


def test_contents_of_inputs_and_labels():
    one, other = item(), item(seed=1)
    mixed = [(one[0], other[1])]
    assert contents_digests([one], 0) == contents_digests([jax.tree.map(jnp.asarray, one)], 0)
    assert contents_digests(mixed, 0) == (contents_digests([one], 0)[0], contents_digests([other], 0)[1])
    assert len({*contents_digests([one], 0), *contents_digests([other], 0)}) == 4


def test_what_jax_drops_makes_no_difference():
    exact = np.arange(4) + 1e-12
    assert contents_digests([(exact, None)], 0) == contents_digests([(exact.astype(np.float32), None)], 0)


@pytest.mark.parametrize("size", [PART * PARTS, 10 * PART * PARTS])
def test_large_ones_are_hashed_in_parts_later(size):
    a = np.zeros(size, np.uint8)
    b = a.copy()
    b[size // 2 + PART + 1] = 1
    whole = [contents_digests([(each, None)], 0) for each in (a, b)]
    later = [contents_digests([(each, None)], WHOLE_BATCHES) for each in (a, b)]
    assert whole[0] != whole[1] and (later[0] != later[1]) == (size == PART * PARTS)
    assert contents_digests([(a + 1, None)], WHOLE_BATCHES) != later[0]


def test_keys():
    one, other = (np.asarray([0]), jax.random.key(1)), (np.asarray([0]), jax.random.key(2))
    assert contents_digests([(one, None)], 0) != contents_digests([(other, None)], 0)
