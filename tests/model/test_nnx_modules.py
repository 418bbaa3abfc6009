"""What nnx modules are made of: paths, variables, switches, plain arrays, axes."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpipe.errors import LayerError
from jaxpipe.model import nnx_modules
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
    assert nnx_modules.axes(nnx.state(dense, nnx.Param)) == {"model", "more"}
    assert nnx_modules.axes(nnx.state(outer(), nnx.Param)) == set()


def test_other_variables_are_refused():
    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    rest = nnx.split(norm, nnx.Param, ...)[2]
    with pytest.raises(
        LayerError, match=r"the variable '(mean|var)' is a BatchStat. Layers with state beside nnx.Param"
    ):
        nnx_modules.reject_state(SPEC, rest)
    nnx_modules.reject_state(SPEC, nnx.split(outer(), nnx.Param, nnx.RngState, ...)[3])
