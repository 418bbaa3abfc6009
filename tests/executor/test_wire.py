"""Messages of different shapes share one permute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.executor.wire import Codec
from tests.compare import assert_close

DTYPES = ["float32", "int32", "bool", "bfloat16", "key<fry>", "key<rbg>"]
leaves = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3))
trees = st.dictionaries(st.sampled_from("abc"), leaves, max_size=3)


def numbers(leaf):
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


@settings(max_examples=60)
@given(st.lists(trees, max_size=4))
def test_round_trip(boundaries):
    key = iter(range(1000))

    def value(leaf):
        dtype, shape = leaf
        noise = jax.random.normal(jax.random.key(next(key)), tuple(shape)) * 9
        if dtype.startswith("key"):
            impl = {"key<fry>": "threefry2x32", "key<rbg>": "rbg"}[dtype]
            one = jax.random.key(next(key), impl=impl)
            return jax.random.split(one, tuple(shape)) if shape else one
        return noise > 0 if dtype == "bool" else noise.astype(dtype)

    values = [{name: value(leaf) for name, leaf in tree.items()} for tree in boundaries]
    abstract = [jax.eval_shape(lambda v=v: v) for v in values]
    codec = Codec(abstract)
    for given_value, like in zip(values, abstract, strict=True):
        wire = codec.encode(given_value)
        assert [(w.shape, w.dtype) for w in wire] == [(s.shape, s.dtype) for s in codec.spec]
        back = codec.decode(wire, like)
        assert jax.tree.map(lambda a: a.dtype, back) == jax.tree.map(lambda a: a.dtype, given_value)
        assert_close(jax.tree.map(numbers, back), jax.tree.map(numbers, given_value), 0)


def test_equal_boundaries_travel_as_they_are():
    like = {"x": jax.ShapeDtypeStruct((2, 3), jnp.float32), "n": None}
    codec = Codec([like, like])
    x = jnp.ones((2, 3))
    assert codec.encode({"x": x, "n": None})[0] is x


def test_what_crosses_no_boundary_is_not_cut_or_padded():
    float32, int32 = (jax.ShapeDtypeStruct((2, 3), dtype) for dtype in (jnp.float32, jnp.int32))
    codec = Codec([{"x": float32}, {"x": int32, "y": float32}])
    for value in ({"x": np.ones((2, 3))[:1]}, {"x": jnp.ones((2, 3), jnp.bfloat16)}, {"y": jnp.ones((2, 3))}):
        with pytest.raises(AssertionError, match="crosses no boundary"):
            codec.encode(value)
    with pytest.raises(AssertionError, match="crosses no boundary"):
        codec.decode(codec.encode({"x": jnp.ones((2, 3))}), {"z": float32})
