"""What nnx modules are made of: paths, variables, switches, plain arrays, axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.errors import LayerError
from jaxpipe.model import nnx_modules
from jaxpipe.model.axes import Annotation
from jaxpipe.model.specs import LayerSpec

SPEC = LayerSpec(nnx.Linear, 2, 2)


class Inner(nnx.Module):
    def __init__(self, deterministic, rngs):
        self.drop = nnx.Dropout(0.5, deterministic=deterministic, rngs=rngs)
        self.dense = nnx.Linear(2, 3, rngs=rngs)


class Outer(nnx.Module):
    def __init__(self, *, rngs, table=None):
        self.blocks = nnx.List([Inner(True, rngs), Inner(False, rngs)])
        self.table = np.arange(3.0) if table is None else table


def outer(seed=0):
    return Outer(rngs=nnx.Rngs(seed))


def with_a_random_table(key):
    return Outer(rngs=nnx.Rngs(key), table=jax.random.normal(key, (2,)))


def test_nested_dicts():
    flat = {("a", "b"): 1, ("a", "c"): 2, ("d",): 3}
    nested = nnx_modules.nest(flat)
    assert nested == {"a": {"b": 1, "c": 2}, "d": 3}
    assert all(nnx_modules.lookup(nested, path) == value for path, value in flat.items())
    assert nnx_modules.path_name(("a", 0)) == ("a", "0")


def test_variables_and_parts_by_path():
    found = nnx_modules.values(outer())
    assert found["blocks", "1", "dense", "kernel"][0] is nnx.Param
    assert found["blocks", "1", "dense", "kernel"][1][0].shape == (2, 3)
    assert any(issubclass(kind, nnx.RngState) for kind, _ in found.values())
    assert {"", "blocks.0.drop", "blocks.1.dense"} <= {path for _, path in nnx_modules.modules(outer())}


def test_switches_that_the_constructor_turned_on_stay_on_in_training():
    module = outer()
    pinned = nnx_modules.pinned(module)
    assert [(node is module.blocks[0].drop, name) for node, name in pinned] == [(True, "deterministic")]
    seen = {}
    for mode in nnx_modules.MODES:
        nnx_modules.in_mode(module, mode, pinned)
        seen[mode] = tuple(block.drop.deterministic for block in module.blocks)
    assert seen == {(True, True): (True, False), (True, False): (True, True), (False, False): (True, True)}


def test_plain_arrays():
    (name,) = nnx_modules.constants(outer())
    assert name == "table"
    nnx_modules.reject_random_constants(SPEC, lambda key: outer())
    with pytest.raises(LayerError, match="the attribute 'table' is a random array but not an nnx.Param"):
        nnx_modules.reject_random_constants(SPEC, with_a_random_table)


def test_axes_that_metadata_names():
    kernel = nnx.with_partitioning(nnx.initializers.zeros, (None, ("model", "more")))
    with nnx.use_eager_sharding(False):
        dense = nnx.Linear(2, 2, kernel_init=kernel, rngs=nnx.Rngs(0))
    assert nnx_modules.annotations(nnx.state(dense, nnx.Param)) == {"kernel": Annotation(((), ("model", "more")))}
    assert nnx_modules.annotations(nnx.state(outer(), nnx.Param)) == {}


def test_variables_as_nested_dicts():
    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    graph, params, streams, state, rest = nnx.split(norm, *nnx_modules.GROUPS, ...)
    held = nnx_modules.Variables(state)
    assert sorted(held.paths) == [("mean",), ("var",)] and nnx_modules.Variables(params).paths != held.paths
    values = held.of(norm)
    assert jax.tree.map(jnp.shape, values) == {"mean": (2,), "var": (2,)}
    again = nnx.merge(graph, params, streams, held.filled({"var": values["var"] + 1, "mean": values["mean"]}), rest)
    assert (again.var[...] == 2).all() and (again.mean[...] == 0).all()


def test_an_intermediate_of_the_constructor_is_refused():
    class Sown(nnx.Module):
        def __init__(self):
            self.seen = nnx.Intermediate(jnp.zeros(2))

    state = nnx.split(Sown(), *nnx_modules.GROUPS, ...)[3]
    with pytest.raises(LayerError, match="the variable 'seen' is an nnx.Intermediate that __init__ makes"):
        nnx_modules.reject_intermediates(SPEC, state)
    nnx_modules.reject_intermediates(SPEC, nnx.split(outer(), *nnx_modules.GROUPS, ...)[3])
