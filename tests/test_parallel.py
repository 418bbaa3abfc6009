"""Functions of layers on further axes: as in a pipeline, where other axes are manual, and alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.errors import ShardingError
from jaxpipe.parallel import constrain, shard_map
from tests.compare import assert_close

MESH = jaxpipe.make_mesh(pipe=2, data=2, model=2)
RNG = np.random.default_rng(0)
W = {"up": RNG.normal(0, 0.2, (8, 12)).astype(np.float32), "down": RNG.normal(0, 0.2, (12, 8)).astype(np.float32)}
X = RNG.normal(size=(4, 6, 8)).astype(np.float32)


def in_a_pipeline(layer, w=W, x=X, mesh=MESH):
    """Value and gradients of a loss of `layer`, as the compiled loop computes them: in a branch, on the rows of a rank."""

    rows = P("data")

    def loss(w, x):
        return (jnp.sin(layer(w, x)) ** 2).sum()

    def on_device(w, x):
        zeros = jnp.float32(0), *jax.tree.map(jnp.zeros_like, (w, x))

        def once(state):
            value, grads = jax.value_and_grad(loss, (0, 1))(w, x)
            return state[0] + 1, (value, *grads)

        value, dw, dx = jax.lax.while_loop(lambda s: s[0] < 1, once, (jnp.int32(0), zeros))[1]
        return *jax.lax.psum((value, dw), "data"), dx

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), rows),
        out_specs=(P(), P(), rows),
        axis_names={"pipe", "data"},
        check_vma=False,
    )
    return jax.jit(mapped)(w, x)


def alone(layer, w=W, x=X):
    value, (dw, dx) = jax.value_and_grad(lambda w, x: (jnp.sin(layer(w, x)) ** 2).sum(), (0, 1))(w, x)
    return value, dw, dx


def dense(w, x):
    return jnp.tanh(x @ w["up"]) @ w["down"]


def megatron(w, x, **options):
    def part(up, down, x):
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

    specs = (P(None, "model"), P("model", None), P())
    run = shard_map(part, in_specs=specs, out_specs=P(), axis_names="model", **options)
    return run(w["up"], w["down"], x)


def gathered(w, x):
    """The sequence cut over the axis, gathered, and cut again; then heads instead of positions, and back."""

    def part(w, x):
        here = jax.lax.all_gather(x, "model", axis=1, tiled=True)
        y = jax.lax.psum_scatter(dense(w, here), "model", scatter_dimension=1, tiled=True) / jax.lax.axis_size("model")
        swapped = jax.lax.all_to_all(y, "model", split_axis=2, concat_axis=1, tiled=True)
        return jax.lax.all_to_all(jnp.cumsum(swapped, 1), "model", split_axis=1, concat_axis=2, tiled=True)

    cut = P(None, "model")
    return shard_map(part, in_specs=(P(), cut), out_specs=cut, axis_names=["model"], check_vma=False)(w, x)


def by_number(w, x):
    """Each device does its own number of columns."""

    def part(w, x):
        mine = jnp.arange(8) % jax.lax.axis_size("model") == jax.lax.axis_index("model")
        return jax.lax.psum(jnp.where(mine, jnp.tanh(x @ w["up"]) @ w["down"], 0), "model")

    return shard_map(part, in_specs=P(), out_specs=P(), axis_names=("model",))(w, x)


def kernel(w, x):
    """A Pallas kernel on each device's part of the columns, with a derivative of its own."""

    def body(x_ref, out_ref):
        out_ref[...] = jnp.tanh(x_ref[...])

    @jax.custom_vjp
    def tanh(h):
        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(h.shape, h.dtype), interpret=True)(h)

    tanh.defvjp(lambda h: (y := tanh(h), y), lambda y, dy: (dy * (1 - y * y),))

    def part(up, down, x):
        return jax.lax.psum(tanh(x @ up) @ down, "model")

    specs = (P(None, "model"), P("model", None), P())
    return shard_map(part, in_specs=specs, out_specs=P(), axis_names="model", check_vma=False)(w["up"], w["down"], x)


def constrained(w, x):
    h = constrain(x @ w["up"], P("data", None, "model"))
    return constrain({"y": jnp.tanh(h) @ w["down"]}, P())["y"]


LAYERS = {
    "megatron": (megatron, dense),
    "unchecked": (lambda w, x: megatron(w, x, check_vma=False), dense),
    "gathered": (gathered, lambda w, x: jnp.cumsum(dense(w, x), 1)),
    "by_number": (by_number, dense),
    "kernel": (kernel, dense),
    "constrained": (constrained, dense),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_dense_computation(name):
    layer, wanted = LAYERS[name]
    expected = alone(wanted)
    assert_close(in_a_pipeline(layer), expected, 1e-6)
    assert_close(alone(layer), expected, 1e-6, "alone: ")


def test_a_mesh_without_the_axis_is_one_device_along_it():
    mesh = jaxpipe.make_mesh(pipe=2, data=2)
    assert_close(in_a_pipeline(gathered, mesh=mesh), alone(LAYERS["gathered"][1]), 1e-6)


def test_what_is_constrained_is_cut():
    """By the shapes of the compiled program: 6 of the 12 columns are on each device."""

    def hidden(h):
        return constrain(jnp.sin(h), P(None, "model")) * 2

    def compiled(layer):
        mapped = jax.shard_map(layer, mesh=MESH, in_specs=P("data"), out_specs=P("data"), axis_names={"pipe", "data"})
        return jax.jit(mapped).lower(np.zeros((4, 12), np.float32)).compile().as_text()

    assert re.search(r"f32\[2,6\]\S* \w*sine?\b|f32\[2,6\]\S* fusion", compiled(hidden))
    assert "f32[2,6]" not in compiled(lambda h: jnp.sin(h) * 2)


def test_a_name_that_the_mesh_does_not_have():
    with pytest.raises(
        ShardingError, match=r"parallel.constrain names the axis 'modle'.*Did you mean 'model'.*modle=1"
    ):
        in_a_pipeline(lambda w, x: constrain(dense(w, x), P(None, "modle")))
    with pytest.raises(ShardingError, match=r"parallel.shard_map names the axis 'expert'"):
        in_a_pipeline(shard_map(dense, in_specs=P(), out_specs=P(), axis_names="expert"))
    assert constrain(X, P(None, "modle")) is X


@pytest.mark.parametrize("axis", ["pipe", "data"])
def test_axes_that_a_layer_is_inside_of_already(axis):
    with pytest.raises(ShardingError, match=rf'a layer is inside of "{axis}" already'):
        shard_map(dense, in_specs=P(), out_specs=P(), axis_names=("model", axis))
