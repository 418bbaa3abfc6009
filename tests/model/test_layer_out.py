"""`LayerOut` as a value."""

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe import metrics
from jaxpipe.model.layer_out import LayerOut
from jaxpipe.model.opening import opened


def test_it_passes_through_transformations():
    def layer(x):
        return LayerOut(x * 2, {"a": x.sum()}, {"m": metrics.Max(x), "p": (x, x)})

    for found in (jax.jit(layer)(jnp.ones(3)), jax.checkpoint(layer)(jnp.ones(3))):
        made = opened(found)
        assert made.losses["a"] == 3 and isinstance(made.metrics["m"], metrics.Max)


def test_a_loss_fn_has_another_form():
    module = jaxpipe.PipelineModule([jnp.tanh], lambda y, t: jaxpipe.LayerOut(y.mean(), {"a": 1.0}))
    one = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(jaxpipe.errors.LossError, match=r"loss_fn returned a jaxpipe.LayerOut.*\(loss, "):
        module.loss_shapes(one, one)
