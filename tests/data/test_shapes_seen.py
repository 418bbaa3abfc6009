"""The warning about many shapes."""

import warnings

import jax
import numpy as np
import pytest

from jaxpipe.data.shapes_seen import MOST, ShapesSeen


def batch(length):
    return np.zeros((2, 4, length)), np.zeros((2, 4), np.int32)


def test_the_ninth_shape_warns_once_and_all_are_named():
    seen = ShapesSeen("training")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for length in range(1, MOST + 1):
                seen.add(batch(length))
        jax.jit(lambda x: seen.add((x, None)) or x)(np.zeros((1, 77)))
    with pytest.warns(UserWarning, match="9 shapes of training batches") as caught:
        seen.add(batch(30))
    text = str(caught[0].message)
    assert all(f"[2,4,{length}]" in text for length in (1, 5, MOST, 30)) and "77" not in text
    assert "jaxpipe.pad_micro_batches" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen.add(batch(40))


def test_another_kind_has_advice_of_its_own():
    seen = ShapesSeen("prompt", "Do that.")
    with pytest.warns(UserWarning, match=r"9 shapes of prompt batches so far.*Do that\.\n  float") as caught:
        for rows in range(1, MOST + 2):
            seen.add(np.zeros(rows))
    assert "pad_micro_batches" not in str(caught[0].message)
