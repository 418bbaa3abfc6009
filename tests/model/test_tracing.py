"""`Tracer`: what layers take and return, on shapes only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.model.context import Context
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.precision import Precision

X = np.ones((4, 3), np.float32)


def dense(wide, narrow):
    def init(key, x):
        return {"w": jax.random.normal(key, (wide, narrow))}

    return jaxpipe.Layer(init, lambda params, x: x @ params["w"], f"Dense{narrow}")


@pytest.mark.parametrize("on_mesh", [False, True])
def test_what_is_handed_on_is_short_except_by_the_last_layer(on_mesh):
    made, mesh = [], jaxpipe.make_mesh(pipe=2) if on_mesh else None

    def wide(p, x):
        made.append(x.dtype)
        return jnp.sin(x).astype(jnp.float32)

    layers = [jaxpipe.Layer(lambda key, x: {}, wide)] * 3
    found = PipelineModule(layers).shapes(X, [{}] * 3, mesh=mesh, precision=Precision("bfloat16"))
    assert [str(shape.inputs.dtype) for shape in found] == ["bfloat16"] * 3
    assert [str(shape.outputs.dtype) for shape in found] == ["bfloat16", "bfloat16", "float32"]
    assert made == ["bfloat16"], "like layers are traced once"
    if mesh is not None:
        assert found[0].run is found[1].run is not found[2].run
        for shape in found:
            y, _ = shape.run({}, jnp.ones((4, 3), jnp.bfloat16), Context())
            assert y.dtype == shape.outputs.dtype and jnp.allclose(y.astype(jnp.float32), np.sin(1), atol=4e-3)


def test_a_layer_that_does_not_fit_names_both():
    module = PipelineModule([dense(3, 5), dense(3, 5)])
    with pytest.raises(LayerError, match=r"layer 1 \(Dense5\) cannot take its input: layer 0 \(Dense5\) returns"):
        module.shapes(X)
    with pytest.raises(LayerError, match=r"layer 0 \(Dense5\) .*the example inputs are float32\[4,4\]"):
        module.shapes(np.ones((4, 4), np.float32))
