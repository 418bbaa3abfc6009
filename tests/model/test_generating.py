"""Layers traced for generation: chunks, caches, and which layer mixes positions."""

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.model import generating
from jaxpipe.model.precision import NO_CASTS, Precision
from tests.generation import ATTENTION, EMBED, HEAD, WIDTH, causal


def traced(module, rows=2, chunk=3, length=7, caches=None, precision=NO_CASTS):
    mesh = jaxpipe.make_mesh(pipe=1)
    params = [s.params for s in module.shapes(jax.ShapeDtypeStruct((rows, chunk), jnp.int32))]
    ids = jax.ShapeDtypeStruct((rows, chunk), jnp.int32)
    return generating.trace(module, params, ids, length, mesh, precision, caches)


def test_caches_are_as_long_as_the_whole_and_the_same_for_single_tokens():
    module = causal()
    prompt = traced(module)
    with_cache = [bool(jax.tree.leaves(cache)) for cache in prompt.caches]
    assert with_cache == [layer.name == "Attention" for layer in module.layers]
    assert [start is not None for start in prompt.starts] == with_cache
    assert {leaf.shape for leaf in jax.tree.leaves(prompt.caches)} == {(2, 7, WIDTH)}
    token = traced(module, chunk=1, caches=prompt.caches)
    assert token.caches == prompt.caches
    assert [s.outputs.shape[:2] for s in token.shapes] == [(2, 1)] * module.num_layers
    # Like layers share one trace.
    assert prompt.shapes[1].run is prompt.shapes[2].run


def test_caches_follow_the_compute_dtype():
    prompt = traced(causal(), precision=Precision("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(prompt.caches)} == {jnp.dtype(jnp.bfloat16)}


def test_the_first_layer_that_mixes_is_found():
    def mean(x):
        return x - x.mean(1, keepdims=True)

    def module(*layers):
        return jaxpipe.PipelineModule([EMBED, *layers, HEAD])

    def mixing(module):
        return generating.mixing(module, traced(module, rows=1, chunk=7))

    assert mixing(module(ATTENTION, jnp.tanh)) is None
    assert mixing(module(ATTENTION, mean)) == (2, "reduce_sum over the positions")

    def places(x):
        return jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None]

    where = jaxpipe.Layer(lambda key, x: {}, lambda params, x: x + places(x))
    told = jaxpipe.Layer(lambda key, x: {}, lambda params, x, *, position=None: x + places(x))
    assert mixing(module(where))[0] == 1 and mixing(module(told)) is None


def test_positions_lie_along_dim_1_where_that_is_as_long_as_the_chunk():
    tree = {"a": jax.ShapeDtypeStruct((2, 3, 4), jnp.int32), "b": jax.ShapeDtypeStruct((2, 5), jnp.int32)}
    assert generating.dims(tree, 3) == [1, None] and generating.dims(tree, 5) == [None, 1]


def test_the_layer_that_fails_is_named():
    with pytest.raises(ValueError, match="room for 12 positions, not for 13") as caught:
        traced(causal(), length=13)
    assert "layer 1 (Attention)" in "".join(caught.value.__notes__)

    def apply(params, x, cache=None):
        return x if cache is None else (x, 1)

    odd = jaxpipe.Layer(lambda key, x: {}, apply, init_cache=lambda x, length: x[:, 0])
    with pytest.raises(LayerError, match="layer 1 .* returns another cache than it was given"):
        traced(jaxpipe.PipelineModule([EMBED, odd, HEAD]))
