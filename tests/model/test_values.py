"""What leaves a layer is a JAX array of a strong, canonical dtype, or an error; and keys become words and keys again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.model.blame import Fault
from jaxpipe.model.shapes import aval
from jaxpipe.model.values import canonical, raw, raw_aval, typed


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (1, "int32"),
        (1.5, "float32"),
        (True, "bool"),
        (1j, "complex64"),
        (np.int64(3), "int32"),
        (np.zeros(2), "float32"),
        (jnp.asarray(1.0), "float32"),
        (np.zeros(3, jax.dtypes.float0), "bool"),
    ],
)
def test_every_leaf_is_strong(leaf, dtype):
    found = canonical({"a": [leaf]})["a"][0]
    assert isinstance(found, jax.Array) and found.dtype == dtype and not found.weak_type
    traced = jax.eval_shape(lambda: canonical(leaf))
    assert traced.dtype == dtype and not traced.weak_type


def test_structure_and_keys_stay():
    key = jax.random.key(0)
    found = canonical((None, {"k": key}))
    assert found[0] is None and found[1]["k"].dtype == key.dtype


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", "returned 'text' of type str, as the entry \\['a'\\]. Layers return arrays, numbers, booleans or"),
        (b"x", "of type bytes"),
        (object(), "of type object"),
        (lambda x: x, "of type function"),
        (10**30, "of type int"),
        (np.array(["a"]), "of type ndarray"),
        (jax.ShapeDtypeStruct((2,), np.float32), "of type ShapeDtypeStruct.*it is no number"),
    ],
    ids=["str", "bytes", "object", "function", "large", "text", "shape"],
)
def test_what_is_no_number(leaf, message):
    with pytest.raises(Fault, match=message):
        canonical({"a": leaf})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_as_words_and_back(impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), 2)
    like = aval(keys)
    words = raw(keys)
    assert words.dtype == jnp.uint32 and aval(words) == raw_aval(like)
    back = typed(words, like)
    assert back.dtype == keys.dtype and (jax.random.key_data(back) == words).all()
    plain = jnp.ones(2)
    assert raw(plain) is plain and typed(plain, aval(plain)) is plain and raw_aval(aval(plain)) == aval(plain)
