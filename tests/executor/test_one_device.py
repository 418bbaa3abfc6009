"""The layers one after the other: params of owners, keys, state and extra losses in order, and what is cast."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.executor.one_device import computed_dtypes, run_layers


def counted(scale):
    """A layer that counts how often it was run, and gives the count as an extra loss."""

    def apply(params, state, x):
        return jaxpipe.LayerOut(x * params["w"] * jnp.float32(scale), losses={"n": state["n"].astype(jnp.float32)}), {
            "n": state["n"] + 1
        }

    return jaxpipe.Layer(lambda key, x: ({"w": jnp.ones(())}, {"n": jnp.int32(scale)}), apply, stateful=True)


def test_layers_in_order():
    module = jaxpipe.PipelineModule([counted(2), jnp.sin, counted(3)])
    params, states = [{"w": jnp.float32(5)}, {}, {"w": jnp.float32(7)}], [{"n": jnp.int32(2)}, {}, {"n": jnp.int32(3)}]
    x = jnp.arange(4, dtype=jnp.float32)
    y, extra, after = run_layers(module.layers, module.owners, params, states, x, jax.random.key(0), True, None)
    np.testing.assert_allclose(y, np.sin(10 * np.arange(4)) * 21, rtol=1e-5)
    assert [float(loss) for loss in extra] == [2, 3]
    assert [int(state["n"]) if state else None for state in after] == [3, None, 4]


def test_what_is_short():
    def apply(params, x):
        assert x.dtype == params["w"].dtype == jnp.bfloat16
        return x * params["w"]

    layer = jaxpipe.Layer(lambda key, x: {"w": jnp.ones(())}, apply)
    layers = [{"w": jnp.ones(()), "norm": jnp.ones(()), "n": jnp.int32(1)}]
    assert computed_dtypes(layers, "bfloat16", "norm") == [jnp.int32, jnp.float32, jnp.bfloat16]
    assert computed_dtypes(layers, None, None) == [jnp.int32, jnp.float32, jnp.float32]
    module = jaxpipe.PipelineModule([layer, layer])
    short = [{"w": jnp.bfloat16(3)}] * 2
    y, extra, after = run_layers(module.layers, (0, 1), short, [{}, {}], jnp.ones(2), None, True, "bfloat16")
    assert y.dtype == jnp.float32 and list(y) == [9, 9] and extra == [] and after == [{}, {}]
