"""Shapes with the mesh axes bound, and functions in which ranks would wait for ever."""

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.model.abstract import abstract, axes_of, on_one_data_rank, with_axes
from jaxpipe.model.blame import Fault
from jaxpipe.model.capture import capture
from jaxpipe.model.jaxprs import equations

X = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def gather(x):
    return jax.lax.all_gather(x, "data", tiled=True)


def test_axes_have_the_sizes_of_the_mesh():
    assert abstract(gather, X, mesh=jaxpipe.make_mesh(pipe=2, data=4)).shape == (12, 4)
    assert abstract(gather, X, mesh=jaxpipe.make_mesh(pipe=2)).shape == (3, 4)
    assert on_one_data_rank(lambda x: {"y": gather(x), "none": None}, X) == {"y": X, "none": None}


def test_what_is_traced_under_axes_runs_under_those_of_another_shard_map():
    mesh, kept = jaxpipe.make_mesh(pipe=1, data=2), []
    with_axes(mesh, lambda: kept.append(capture(lambda x: jax.lax.psum(x, "data"), X)) or ())()
    spec = jax.P("data")
    x = jnp.arange(24.0).reshape(6, 4)
    found = jax.jit(jax.shard_map(kept[0], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(x)
    assert (found == jnp.concatenate([x[:3] + x[3:]] * 2)).all()


WRAPPED = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > 0, lambda x: x, f, x),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0],
    "while": lambda f: lambda x: jax.lax.while_loop(lambda c: f(c).sum() > 0, lambda c: c, x),
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_collectives_that_never_end_are_found_wherever_they_are(wrap):
    def permute(x):
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    two, one = jaxpipe.make_mesh(pipe=2, data=2), jaxpipe.make_mesh(pipe=1, data=2)
    with pytest.raises(Fault, match="ppermute"):
        abstract(wrap(permute), X, mesh=two)
    assert abstract(wrap(permute), X, mesh=one) == X
    with pytest.raises(Fault, match='names the mesh axis "pipe" \\(in psum'):
        abstract(wrap(lambda x: jax.lax.psum(x, ("data", "pipe"))), X, mesh=one)
    with pytest.raises(Fault, match='names the mesh axis "pipe" \\(in axis_index'):
        abstract(wrap(lambda x: x * jax.lax.axis_index("pipe").astype(x.dtype)), X, mesh=two)


def test_axes_of_a_collective():
    traced = jax.make_jaxpr(gather, axis_env=[("data", 2)])(X)
    assert [axes_of(equation) - {()} for equation in equations(traced) if "gather" in equation.primitive.name] == [
        {"data"}
    ]
