"""What is frozen, layer by layer, tied layers included."""

import jax
import jax.numpy as jnp

import jaxpipe
from jaxpipe.layout.frozen import Frozen, hidden
from jaxpipe.layout.layout import Layout
from jaxpipe.model.trainable import Trainable


def dense(key, x):
    return {"b": jnp.zeros(2), "ids": jnp.arange(2), "w": jax.random.normal(key, (2, 2))}


def factory():
    return jaxpipe.Layer(dense, lambda params, x: x @ params["w"])


MODULE = jaxpipe.PipelineModule(
    [jaxpipe.TiedLayerSpec("t", factory), factory(), jnp.tanh, jaxpipe.TiedLayerSpec("t", factory)]
)
PARAMS = [layer.params for layer in MODULE.shapes(jnp.ones((4, 2)))]


def frozen(rule):
    return Frozen.of_model(MODULE, PARAMS, Trainable.of(rule))


def test_tied_layers_are_as_their_owner():
    found = frozen("layer_000/w")
    assert [found.of(layer) for layer in range(4)] == [{0}, {0, 2}, frozenset(), {0}]
    assert [found.trains(layer) for layer in range(4)] == [True, False, False, True]
    assert found.any and not frozen(None).any
    assert [frozen(None).trains(layer) for layer in range(4)] == [True, True, False, True]


def test_none_in_the_place_of_what_is_frozen():
    assert hidden({"a": True, "b": {"c": False}}, {"a": 1, "b": {"c": 2}}) == {"a": None, "b": {"c": 2}}


def test_layers_of_which_other_params_are_frozen_are_other_stacks():
    layer = factory()
    module = jaxpipe.PipelineModule([layer] * 4)
    params = [shape.params for shape in module.shapes(jnp.ones((4, 2)))]

    def made(rule):
        return Layout(module, (0, 2, 4), params, trainable=Trainable.of(rule))

    assert [list(stack.places) for stack in made(None).stacks.values()] == [[0, 1, 2, 3]]
    assert [list(stack.places) for stack in made(r"/w").stacks.values()] == [[0, 1, 2, 3]]
    parts = made(r"layer_00[13]")
    assert [list(stack.places) for stack in parts.stacks.values()] == [[0, 2], [1, 3]]
    gradients = parts.trained(parts.shapes())
    first, second = gradients["stacked"].values()
    assert first["w"] is None and first["ids"].shape == (2, 1, 2) and second["w"].shape == (2, 1, 2, 2)
    whole = made(None)
    assert whole.trained(whole.shapes()) == whole.shapes()
    assert parts.layer(gradients, 0)["b"] is None and parts.layer(gradients, 1)["b"].shape == (2,)
