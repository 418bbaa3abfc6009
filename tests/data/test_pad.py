"""Micro-batches made alike, and the weights that say what of them is real."""

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, DataError


def item(rows, length, start=0):
    ids = start + np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    return {"ids": ids, "age": np.arange(rows, dtype=np.float32)}, -ids


def test_rows_and_lengths_are_those_of_the_largest():
    items = [item(2, 3), item(3, 2, 100), item(1, 5, 200)]
    made = jaxpipe.pad_micro_batches(iter(items), fill=7)
    for (inputs, (labels, weights)), (x, y) in zip(made, items, strict=True):
        rows, length = y.shape
        assert inputs["ids"].shape == labels.shape == weights.shape == (3, 5) and inputs["age"].shape == (3,)
        np.testing.assert_array_equal(inputs["ids"][:rows, :length], x["ids"])
        np.testing.assert_array_equal(labels[:rows, :length], y)
        assert (inputs["ids"][:, length:] == 7).all() and (labels[:, length:] == 7).all()
        np.testing.assert_array_equal(inputs["age"][rows:], x["age"][-1:].repeat(3 - rows))
        np.testing.assert_array_equal(inputs["ids"][rows:, :length], x["ids"][-1:].repeat(3 - rows, 0))
        assert weights.dtype == np.float32 and weights.sum() == rows * length and weights[:rows, :length].all()
        assert inputs["ids"].dtype == x["ids"].dtype


def test_sizes_that_are_asked_for_and_micro_batches_that_are_not_there():
    made = jaxpipe.pad_micro_batches([item(2, 3)], num_micro_batches=3, rows=4, length=5, multiple_of=4)
    assert len(made) == 3 and all(inputs["ids"].shape == (4, 8) for inputs, _ in made)
    assert [weights.sum() for _, (_, weights) in made] == [6, 0, 0]


def test_labels_of_one_dim_have_weights_per_row():
    made = jaxpipe.pad_micro_batches([(np.ones((n, 2)), np.arange(n)) for n in (3, 1)])
    np.testing.assert_array_equal([weights for _, (_, weights) in made], [[1, 1, 1], [1, 0, 0]])


def test_what_fits_already_is_not_copied():
    x = np.ones((2, 3))
    [(inputs, (labels, weights))] = jaxpipe.pad_micro_batches([(x, x)])
    assert np.shares_memory(inputs, x) and np.shares_memory(labels, x) and weights.all()


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "no micro-batch"),
        ([item(2, 3)] * 3, {"num_micro_batches": 2}, "got 3 micro-batches, more than num_micro_batches=2"),
        ([item(2, 3)], {"rows": 1}, "rows=1 is less than the 2"),
        ([item(2, 3)], {"length": 2}, "length=2 is less than the 3"),
        ([(np.ones((2, 3)), None)], {}, "Micro-batch 0 has no labels"),
        ([(np.ones((2, 3)), np.ones(3))], {}, "Micro-batch 0: labels"),
        ([item(2, 3), (np.ones((2, 3)), np.ones((2, 3)))], {}, "Micro-batch 1 is .* but micro-batch 0 is"),
        ([(np.ones((2, 3, 4)), np.ones(2)), (np.ones((2, 3, 5)), np.ones(2))], {}, r"rows \(dim 0\) and lengths"),
        ([(np.ones((2, 3)), np.ones(2)), (np.ones((2, 3), np.int32), np.ones(2))], {}, "in nothing else"),
        ([np.ones(3)], {}, "It is a pair"),
        (3, {}, "micro_batches=3 is no iterable"),
        ([(np.ones(2, int), np.ones(2)), (np.ones(2, np.int32), np.ones(2))], {}, "is int32, and was int64 there"),
        ([(jax.random.split(jax.random.key(0), 2), np.ones(2))], {}, r"key<fry>\[2\].*jax.random.key_data"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_cannot_be_padded_is_named(items, options, message):
    with pytest.raises(DataError, match=message):
        jaxpipe.pad_micro_batches(items, **options)


@pytest.mark.parametrize("name", ["num_micro_batches", "rows", "length", "multiple_of"])
def test_sizes_are_counts(name):
    with pytest.raises(ConfigError, match=f"{name}=0 must be an integer, 1 or more"):
        jaxpipe.pad_micro_batches([item(2, 3)], **{name: 0})


def test_a_filling_is_a_number_of_the_array():
    def filled(dtype, fill):
        items = [(np.ones((1, length), dtype), np.ones(1)) for length in (1, 2)]
        return jaxpipe.pad_micro_batches(items, fill=fill)[0][0][0, 1]

    assert filled(np.int8, -1) == -1 and filled(np.float32, 0.5) == 0.5 and np.isnan(filled(np.float32, np.nan))
    assert not filled(bool, -100), "what is not there is not in a mask"
    for dtype, fill in [(np.uint8, -1), (np.int32, 0.5), (np.int32, np.nan), (np.int32, "x"), (np.float32, [1, 2])]:
        with pytest.raises(ConfigError, match=f"no number that an array of {np.dtype(dtype)} can hold"):
            filled(dtype, fill)
