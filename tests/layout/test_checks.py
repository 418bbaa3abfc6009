"""Params of something else are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.layout.checks import check_layers, check_params
from jaxpipe.layout.layout import Layout

BLOCK = jaxpipe.Layer(lambda key, x: {"w": jnp.ones((2, 3))}, lambda p, x: x, "block")
MODULE = jaxpipe.PipelineModule([BLOCK] * 5)
LAYERS = [{"w": np.ones((2, 3), np.float32)}] * 5


def test_params_of_another_layout():
    layout = Layout(MODULE, (0, 3, 5), LAYERS)
    check_params(layout, layout.shapes())
    other = Layout(MODULE, (0, 4, 5), LAYERS).shapes()
    for wrong in (other, {**layout.shapes(), "more": {}}, {"stacked": {}, "shared": {}}, None, [object()]):
        with pytest.raises(LayerError, match="those of this pipeline are"):
            check_params(layout, wrong)
    padded = Layout(MODULE, (0, 3, 5), LAYERS, {"pipe": 2, "data": 5}, 1)
    with pytest.raises(LayerError, match=r"float32\[2,3,2,3\].*those of this pipeline are .*float32\[2,3,2,5\]"):
        check_params(padded, layout.shapes())
    assert jax.tree.leaves(padded.shapes())[0].shape == (2, 3, 2, 5)


def test_layers_of_another_module():
    wide = [*LAYERS[:3], {"w": np.ones((2, 3), np.float16)}, *LAYERS[4:]]
    with pytest.raises(LayerError, match=r"layer 3 \(block\): expected params .*float32.*got .*float16"):
        check_layers(MODULE, wide, LAYERS)
