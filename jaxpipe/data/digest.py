"""Hashes of micro-batches, by which processes compare what they bring without sending it."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxpipe.data.leaves import named
from jaxpipe.model.identity import PART, PARTS, of_array
from jaxpipe.model.shapes import aval, is_key
from jaxpipe.types import AnyArray, Batch, Tree

# The first batches are hashed whole. Later ones in parts, if they are large: that finds iterators that drift apart, and
# costs less than a millisecond.
WHOLE_BATCHES = 3
# What the contents are hashes of.
CONTENTS = ("inputs", "labels")


def shapes_digest(items: Sequence[Batch], rows: Sequence[int]) -> int:
    """A hash of structure, shapes and dtypes of micro-batches, a positive int32.

    Args:
      items: (inputs, labels) with leaves [B, ...].
      rows: how many rows the whole of each has, of which the items may hold a part.
    """
    text = [(name, aval(leaf).shape[1:], str(aval(leaf).dtype)) for item in items for name, leaf in named(*item)]
    return _positive(zlib.crc32(repr((list(rows), text)).encode()))


def contents_digests(items: Sequence[Batch], batches_before: int) -> tuple[int, int]:
    """Hashes of the numbers in the inputs and in the labels, positive int32.

    Args:
      batches_before: how many were hashed before. The first few are hashed whole.
    """
    whole = batches_before < WHOLE_BATCHES
    return _contents([inputs for inputs, _ in items], whole), _contents([labels for _, labels in items], whole)


def _contents(tree: Tree, whole: bool) -> int:
    found = 0
    for leaf in jax.tree.leaves(tree):
        found = _hash(leaf, whole, found)
    return _positive(found)


def _hash(leaf: AnyArray, whole: bool, before: int) -> int:
    if isinstance(leaf, jax.Array) and is_key(leaf):
        leaf = jax.random.key_data(leaf)
    # In the dtype that it will have on the devices: what JAX drops makes no difference.
    return of_array(np.asarray(leaf, aval(leaf).dtype), before, None if whole else PART * PARTS)


def _positive(number: int) -> int:
    return number & 0x7FFFFFFF
