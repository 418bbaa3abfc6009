"""Which list entries are layers of one kind. A false yes would compute with the wrong function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxpipe
from jaxpipe.model.layers import bind


def factory(scale, table=None):
    return jaxpipe.Layer(
        lambda key, x: {"b": jnp.zeros(2)}, lambda p, x: scale * x + p["b"] + (0 if table is None else table)
    )


def same(a, b):
    first, second = bind([a, b])
    return first is second


def test_one_kind():
    assert same(factory(2.0), factory(2.0))
    assert same(jax.nn.relu, jax.nn.relu)
    assert same(jaxpipe.LayerSpec(nnx.Linear, 3, 4), jaxpipe.LayerSpec(nnx.Linear, 3, 4))
    assert same(functools.partial(jnp.clip, min=0), functools.partial(jnp.clip, min=0))
    assert same(
        jaxpipe.LayerSpec(nnx.Linear, 3, 3, kernel_init=nnx.initializers.ones),
        jaxpipe.LayerSpec(nnx.Linear, 3, 3, kernel_init=nnx.initializers.ones),
    )
    a, b = ((lambda x, f=f: f(x)) for f in (jnp.tanh, jnp.tanh))
    assert same(a, b)


def test_different_kinds():
    assert not same(factory(2.0), factory(3.0))
    assert not same(factory(1), factory(True))
    assert not same(factory(1.0, np.ones(2)), factory(1.0, np.ones(2))), (
        "arrays may change: only the same object counts"
    )
    assert not same(jax.nn.relu, jax.nn.gelu)
    assert not same(jaxpipe.LayerSpec(nnx.Linear, 3, 4), jaxpipe.LayerSpec(nnx.Linear, 3, 4, use_bias=False))
    assert not same(lambda x: x + 1, lambda x: x + 1), "different code objects"
    assert not same(functools.partial(jnp.clip, min=0), functools.partial(jnp.clip, min=1))
    a, b = ((lambda x, f=f: f(x)) for f in (jnp.tanh, jnp.sin))
    assert not same(a, b)


def test_a_tie_is_never_merged_with_an_untied_layer():
    tied = jaxpipe.TiedLayerSpec("k", nnx.Linear, 3, 3)
    assert not same(tied, jaxpipe.LayerSpec(nnx.Linear, 3, 3))
    assert not same(tied, jaxpipe.TiedLayerSpec("other", nnx.Linear, 3, 3))
