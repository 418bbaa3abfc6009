"""Metadata of flax about axes, through the pipeline."""

import warnings

import jax
import pytest
from flax import linen, nnx

import jaxpipe
from tests.compare import assert_close
from tests.model.flax_layers import Spec, X


class Annotated(nnx.Module):
    def __init__(self, axes, *, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
        self.dense = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


class LinenAnnotated(linen.Module):
    axes: tuple
    logical: bool = False

    @linen.compact
    def __call__(self, x):
        wrap = linen.with_logical_partitioning if self.logical else linen.with_partitioning
        return linen.Dense(8, kernel_init=wrap(linen.initializers.lecun_normal(), self.axes))(x)


@pytest.mark.parametrize(
    "entry",
    [
        lambda axes: Spec(Annotated, axes),
        lambda axes: Spec(LinenAnnotated, axes),
        lambda axes: Spec(LinenAnnotated, axes, True),
    ],
    ids=["nnx", "linen", "logical"],
)
def test_metadata_is_taken_off_and_its_axes_are_told(entry):
    def loss(y, t):
        return (y**2).mean()

    with pytest.warns(UserWarning, match=r"Annotated\(.*name the axes \['model'\]") as told:
        module = jaxpipe.PipelineModule([entry((None, "model"))] * 3, loss)
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 1)
        params = pipe.init(0, X)
        found, grads = pipe.value_and_grad(params, (X[None], None))
    assert len(told) == 1
    layers = pipe.to_layers(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = jaxpipe.PipelineModule([entry((None, None))] * 3, loss)
        other = jaxpipe.Pipeline(plain, jaxpipe.make_mesh(pipe=2), 1)
        wanted, wanted_grads = other.value_and_grad(other.from_layers(jax.device_get(layers)), (X[None], None))
    assert_close((found, pipe.to_layers(grads)), (wanted, other.to_layers(wanted_grads)), 1e-6)
