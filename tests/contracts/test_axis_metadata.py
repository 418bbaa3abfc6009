"""Metadata of flax about axes, through the pipeline."""

import jax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from tests.compare import assert_close
from tests.model.flax_layers import Spec, X


class Annotated(nnx.Module):
    def __init__(self, axes, *, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
        self.dense = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return jax.lax.with_sharding_constraint(self.dense(x), P(None, "model"))


class LinenAnnotated(linen.Module):
    axes: tuple
    logical: bool = False

    @linen.compact
    def __call__(self, x):
        wrap = linen.with_logical_partitioning if self.logical else linen.with_partitioning
        x = linen.Dense(8, kernel_init=wrap(linen.initializers.lecun_normal(), self.axes), name="dense")(x)
        if self.logical:
            return linen.with_logical_constraint(x, ("rows", "mlp"))
        return jax.lax.with_sharding_constraint(x, P(None, "model"))


def boxed(axes):
    """A pair of functions around a linen module, whose params are boxes."""
    module = LinenAnnotated(axes, True)
    return jaxpipe.Layer(lambda key, x: module.init(key, x)["params"], lambda p, x: module.apply({"params": p}, x))


ENTRIES = {
    "nnx": lambda axes: Spec(Annotated, axes),
    "linen": lambda axes: Spec(LinenAnnotated, axes),
    "logical": lambda axes: Spec(LinenAnnotated, axes, True),
    "boxed": boxed,
}
RULES = {"embed": None, "mlp": "model", "rows": "data"}


def module_of(entry, axes, **options):
    return jaxpipe.PipelineModule([entry(axes)] * 3, lambda y, t: (y**2).mean(), **options)


@pytest.mark.parametrize("name", ENTRIES)
def test_metadata_is_taken_off_and_followed(name):
    """The loss and gradients are those of the oracle, on a mesh that a caller has set for flax, too."""
    axes = (None, "model") if name in ("nnx", "linen") else ("embed", "mlp")
    module = module_of(ENTRIES[name], axes, axis_rules=RULES)
    mesh = jaxpipe.make_mesh(pipe=2, data=2, model=2)
    pipe = jaxpipe.Pipeline(module, mesh, 1)
    with jax.set_mesh(mesh):
        params = pipe.init(0, X)
        found, grads = pipe.value_and_grad(params, (X[None], None))
        layers = pipe.to_layers(params)
        wanted = jaxpipe.reference.value_and_grad(module, layers, (X[None], None))
    assert all(isinstance(leaf, jax.Array) for leaf in layers[0]["dense"].values())
    assert_close((found, pipe.to_layers(grads)), wanted, 1e-6)
    kernel = next(iter(params["stacked"].values()))["dense"]["kernel"]
    assert kernel.sharding.spec == P("pipe", None, None, "model")
    again = pipe.from_layers([jax.tree.map(lambda a: linen.Partitioned(a, ("embed", None)), layer) for layer in layers])
    assert_close(again, params, 0)


@pytest.mark.parametrize("name", ["logical", "boxed"])
def test_names_say_nothing_where_there_are_no_axes(name):
    module = module_of(ENTRIES[name], ("anything", "model"))
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 1)
    params = pipe.init(0, X)
    with linen.logical_axis_rules([("rows", "data"), ("mlp", "model")]):  # those of another program
        found = pipe.evaluate(params, (X[None], None))
    assert_close(found, jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), (X[None], None))[0], 1e-6)
