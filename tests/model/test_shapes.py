"""Abstract values, and how messages show them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.model.shapes import aval, avals, describe, is_inexact, is_key, signature, sum_dtype


@pytest.mark.parametrize(
    ("leaf", "shape", "dtype"),
    [
        (np.zeros((2, 3)), (2, 3), "float32"),
        (np.zeros(2, np.int64), (2,), "int32"),
        (3, (), "int32"),
        (1.5, (), "float32"),
        (True, (), "bool"),
        (jnp.zeros(2, jnp.bfloat16), (2,), "bfloat16"),
        (jax.ShapeDtypeStruct((4,), np.float64), (4,), "float32"),
        ([[1, 2]], (1, 2), "int32"),
    ],
)
def test_as_jax_sees_it(leaf, shape, dtype):
    assert aval(leaf) == jax.ShapeDtypeStruct(shape, dtype)


def test_keys_are_leaves_of_their_own_dtype():
    key = jax.random.key(0)
    assert aval(key).shape == () and is_key(aval(key)) and is_key(jax.random.split(key))
    assert not is_key(jax.random.key_data(key)) and not is_inexact(key)


def test_signatures_are_equal_for_equal_shapes_and_structure_only():
    tree = {"a": np.zeros((2, 3)), "b": [1.0, None]}
    assert hash(signature(tree)) == hash(signature(avals(tree))) and signature(tree) == signature(avals(tree))
    for other in ({"a": np.zeros((3, 2)), "b": [1.0, None]}, {"a": np.zeros((2, 3)), "b": [1, None]}):
        assert signature(other) != signature(tree)
    assert signature((1.0,)) != signature([1.0])


def test_what_has_derivatives():
    assert is_inexact(jnp.ones(2)) and is_inexact(np.ones(2, complex)) and is_inexact(jnp.ones(2, jnp.float16))
    assert not is_inexact(jnp.ones(2, int)) and not is_inexact(jnp.ones(2, bool))


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
    + [("int8", "int8"), ("complex64", "complex64")],
)
def test_the_dtype_to_sum_in(dtype, wanted):
    assert sum_dtype(jnp.dtype(dtype)) == jnp.dtype(wanted)


def test_texts():
    assert describe(np.zeros((8, 16))) == "float32[8,16]" and describe(1) == "int32[]"
    assert describe({"a": (np.zeros(2), None), "b": []}) == "{'a': (float32[2], None), 'b': []}"
    assert "key<fry>[]" in describe(jax.random.key(0))
