"""What a layer may return, taken apart, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import metrics
from jaxpipe.model.blame import Fault
from jaxpipe.model.layer_out import LayerOut
from jaxpipe.model.opening import opened

Y = {"h": jnp.ones((2, 3)), "none": None}


def test_what_is_no_layer_out_is_the_output():
    for y in (Y, (Y, 1.0), None, 3):
        found = opened(y)
        assert found.y is y and found.losses == {} and found.metrics == {}


def test_losses_are_long_scalars_and_metrics_have_rules():
    losses = {"a": 1, "b": np.float64(2), "c": jnp.bfloat16(3), "d": jnp.zeros((), jnp.float16)}
    found = opened(LayerOut(Y, losses, {"mean": jnp.ones(4), "pair": (1.0, 2), "max": metrics.Max(3)}))
    assert found.y is Y
    assert {name: (float(a), a.dtype, a.weak_type) for name, a in found.losses.items()} == {
        name: (value, jnp.float32, False) for name, value in zip("abcd", (1, 2, 3, 0), strict=True)
    }
    assert {name: type(metric) for name, metric in found.metrics.items()} == {
        "mean": metrics.Mean,
        "pair": metrics.WeightedMean,
        "max": metrics.Max,
    }
    with jax.enable_x64(True):
        assert opened(LayerOut(1, {"a": np.float64(2)})).losses["a"].dtype == jnp.float64


REFUSED = {
    "a pytree": ((LayerOut(Y), 1), r"a jaxpipe.LayerOut as the entry \[0\] of a pytree.*the whole of what"),
    "itself": (LayerOut(LayerOut(Y)), "inside of another one"),
    "deep": (LayerOut({"a": [LayerOut(Y)]}), r"the entry \['a'\]\[0\]"),
    "a list of losses": (LayerOut(Y, [1.0]), r"with losses=\[1.0\].*takes a dict"),
    "a number as name": (LayerOut(Y, {1: 1.0}), "losses of the name 1"),
    "an empty name": (LayerOut(Y, {}, {"": 1.0}), "metrics of the name ''"),
    "a vector": (
        LayerOut(Y, {"a": jnp.ones(3)}),
        r"'a' as float32\[3\], which is not a real scalar.*\.mean\(\).*vmapped",
    ),
    "a complex loss": (LayerOut(Y, {"a": jnp.complex64(1)}), "not a real scalar"),
    "a bool": (LayerOut(Y, {"a": True}), "of type bool"),
    "a mask": (LayerOut(Y, {"a": jnp.bool_(True)}), "not a real scalar"),
    "a text": (LayerOut(Y, {"a": "1"}), "of type str"),
    "None": (LayerOut(Y, {"a": None}), "of type NoneType"),
    "a pair": (LayerOut(Y, {"a": (1.0, 2.0)}), "of type tuple"),
    "a metric of no form": (LayerOut(Y, {}, {"a": "text"}), "none of the forms of metrics.*'a' is a str"),
    "rows": (LayerOut(Y, {}, {"a": metrics.Concat(jnp.ones(3))}), "'a' as a metrics.Concat"),
}


@pytest.mark.parametrize(("result", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(result, message):
    with pytest.raises(Fault, match=message):
        opened(result)


def test_the_layer_is_named():
    x = np.zeros((2, 3), np.float32)
    module = jaxpipe.PipelineModule([jnp.tanh, lambda x: (jaxpipe.LayerOut(x), x)])
    with pytest.raises(jaxpipe.errors.LayerError, match=r"layer 1 \(lambda\) returned a jaxpipe.LayerOut as the entry"):
        module.shapes(x)
