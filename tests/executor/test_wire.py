"""Messages of different shapes share one permute."""

import jax
import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.executor.wire import Codec
from tests.compare import assert_close

leaves = st.tuples(st.sampled_from(["float32", "int32", "bool"]), st.lists(st.integers(0, 3), max_size=3))
trees = st.dictionaries(st.sampled_from("abc"), leaves, max_size=3)


@settings(max_examples=60)
@given(st.lists(trees, max_size=4))
def test_round_trip(boundaries):
    key = iter(range(1000))

    def value(leaf):
        dtype, shape = leaf
        noise = jax.random.normal(jax.random.key(next(key)), tuple(shape)) * 9
        return noise > 0 if dtype == "bool" else noise.astype(dtype)

    values = [{name: value(leaf) for name, leaf in tree.items()} for tree in boundaries]
    abstract = [jax.eval_shape(lambda v=v: v) for v in values]
    codec = Codec(abstract)
    for given_value, like in zip(values, abstract, strict=True):
        wire = codec.encode(given_value)
        assert [(w.shape, w.dtype) for w in wire] == [(s.shape, s.dtype) for s in codec.spec]
        assert_close(codec.decode(wire, like), given_value, 0)


def test_equal_boundaries_travel_as_they_are():
    like = {"x": jax.ShapeDtypeStruct((2, 3), jnp.float32), "n": None}
    codec = Codec([like, like])
    x = jnp.ones((2, 3))
    assert codec.encode({"x": x, "n": None})[0] is x
