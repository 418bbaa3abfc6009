"""Hashes of models: equal for equal models, whatever object they are, and different where a number differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.model import identity

MESH = jaxpipe.make_mesh(pipe=1, data=2)
X = jax.ShapeDtypeStruct((4, 3), jnp.float32)


def layer(scale=1.0, start=1.0, width=3, table=(1.0, 2.0, 3.0)):
    table = np.asarray(table, np.float32)
    return jaxpipe.Layer(
        lambda key, x: {"w": start * jax.random.normal(key, (3, width))},
        lambda params, x: jnp.tanh(scale * x + table[None]) @ params["w"] @ jnp.ones((width, 3)),
    )


def hashes(*layers):
    module = jaxpipe.PipelineModule(layers)
    return identity.of_layers(module, module.shapes(X, mesh=MESH), MESH)


def test_the_same_again():
    assert hashes(layer(), jax.nn.relu) == hashes(layer(), jax.nn.relu)


@pytest.mark.parametrize(
    "odd", [{"scale": 1.5}, {"start": 0.5}, {"width": 4}, {"table": (1.0, 2.0, 4.0)}], ids=lambda odd: next(iter(odd))
)
def test_one_layer_is_other(odd):
    same, other = hashes(layer(), layer()), hashes(layer(), layer(**odd))
    assert same[0] == other[0] and same[1] != other[1]


def test_the_loss():
    def of(scale):
        module = jaxpipe.PipelineModule([layer()], lambda y, t: jax.lax.pmean(scale * jnp.mean((y - t) ** 2), "data"))
        return identity.of_loss(module, X, X, MESH)

    assert of(1.0) == of(1.0) != of(2.0)
    assert identity.of_loss(jaxpipe.PipelineModule([layer()]), X, X, MESH) == 0


def test_arrays():
    big = np.zeros(3 * identity.WHOLE, np.uint8)
    other = big.copy()
    other[: identity.PART] = 1
    assert identity.of_arrays([big]) != identity.of_arrays([other])
    one = {"a": jnp.ones(3), "k": jax.random.key(1), "none": np.zeros((0, 2)), "x": 1.0}
    assert identity.of_arrays(one) == identity.of_arrays(dict(one))
    for name, value in {"a": jnp.ones(3).at[2].set(2), "k": jax.random.key(2), "x": 2.0}.items():
        assert identity.of_arrays(one) != identity.of_arrays(one | {name: value})
