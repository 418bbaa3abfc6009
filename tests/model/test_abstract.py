"""Shapes with the axes bound that a step binds; and collectives in which ranks would wait for ever."""

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.model.abstract import abstract, axes_of, equations, with_data_axis
from jaxpipe.model.blame import Fault

X = jax.ShapeDtypeStruct((4, 3), jnp.float32)
MESH = jaxpipe.make_mesh(pipe=2, data=2)


def gathered(x):
    return jax.lax.all_gather(x, "data", tiled=True), jax.lax.psum(x, "data").sum()


def test_collectives_over_data():
    assert abstract(gathered, X) == (X, jax.ShapeDtypeStruct((), jnp.float32)), "of one device without a mesh"
    assert abstract(gathered, X, mesh=MESH)[0].shape == (8, 3)


def test_arguments_are_taken_as_shapes():
    def fails_on_values(tree):
        assert isinstance(tree["x"], jax.core.Tracer)
        return tree["x"].T

    assert abstract(fails_on_values, {"x": jnp.ones((4, 3))}).shape == (3, 4)


def permuted(x):
    return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (permuted, "uses jax.lax.ppermute"),
        (jax.jit(permuted), "uses jax.lax.ppermute"),
        (lambda x: jax.lax.psum(x, "pipe"), 'names the mesh axis "pipe"'),
        (lambda x: jax.lax.pmean(x, ("data", "pipe")), 'names the mesh axis "pipe"'),
        (lambda x: jax.lax.fori_loop(0, 2, lambda _, y: jax.lax.psum(y, "pipe"), x), 'names the mesh axis "pipe"'),
    ],
    ids=["permute", "inside jit", "pipe", "both", "inside a loop"],
)
def test_what_would_wait_for_ever(function, message):
    with pytest.raises(Fault, match=message):
        abstract(function, X, mesh=MESH)


def test_one_rank_may_permute():
    assert abstract(permuted, X, mesh=jaxpipe.make_mesh(pipe=1, data=2)).shape == X.shape


def test_data_as_an_axis_of_a_trace():
    assert jax.eval_shape(with_data_axis(lambda x: jax.lax.psum(x, "data"), 3), X).shape == (3, 4, 3)


def test_equations_in_bodies_are_found():
    def nested(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.jit(jnp.sin)(x), lambda x: jax.lax.psum(x, "data"), x)

    traced = jax.make_jaxpr(nested, axis_env=[("data", 2)])(jnp.ones(3))
    found = {equation.primitive.name: equation for equation in equations(traced)}
    assert {"cond", "sin"} <= found.keys()
    assert {"data"} in [axes_of(equation) for equation in equations(traced)]
    assert axes_of(found["sin"]) == set()
