"""What is taken as prompts, how it is grouped by length, and how the caller gets it back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.errors import DataError
from jaxpipe.evaluation.prompts import Prompts


@pytest.mark.parametrize(
    "given", [[[1, 2], [3, 4]], ((1, 2), (3, 4)), np.array([[1, 2], [3, 4]], np.uint8), [jnp.array([1, 2]), [3, 4]]]
)
def test_prompts_of_one_length_are_one_array(given):
    found = Prompts.of(given)
    (part,) = found.parts
    assert not found.unlike and part.ids.dtype == np.int32 and part.ids.tolist() == [[1, 2], [3, 4]]
    assert part.numbers.tolist() == [0, 1]
    tokens = jnp.zeros((2, 5), jnp.int32)
    assert found.joined([tokens]) is tokens


def test_prompts_of_unlike_lengths_are_grouped_and_come_back_in_order():
    given = [[1, 2], [3], np.array([4, 5]), (6, 7, 8), jnp.array([9])]
    found = Prompts.of(given)
    assert [(part.ids.tolist(), part.numbers.tolist()) for part in found.parts] == [
        ([[1, 2], [4, 5]], [0, 2]),
        ([[3], [9]], [1, 4]),
        ([[6, 7, 8]], [3]),
    ]
    rows = found.joined([jnp.pad(part.ids, ((0, 0), (0, 1))) for part in found.parts])
    assert found.unlike and [row.tolist() for row in rows] == [[1, 2, 0], [3, 0], [4, 5, 0], [6, 7, 8, 0], [9, 0]]


def test_prompts_of_a_trace():
    found = jax.jit(lambda ids: Prompts.of(ids).parts[0].ids)(np.ones((2, 3), np.int16))
    assert found.shape == (2, 3) and found.dtype == jnp.int32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1], []], r"\[1,0\]. Prompts are ids"),
        ([[1, 2], [0.5]], "Prompts are ids"),
        ([], "Prompts are ids"),
        ([[1], 2], "are no array"),
        ([[1, 2], [-1]], "from -1 to -1"),
        ({"source": [[1]], "target": [[1]]}, "prompts are a dict.*docs/howto/two_streams.md has the loop"),
        ((np.ones((2, 3), int), np.ones((2, 2), int)), "prompts are a tuple.*evaluated once per token"),
    ],
    ids=["empty", "float", "none", "mixed", "negative", "dict", "tuple"],
)
def test_what_is_no_prompt_is_named(given, message):
    with pytest.raises(DataError, match=message):
        Prompts.of(given)
