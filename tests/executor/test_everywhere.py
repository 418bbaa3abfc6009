"""Layers that occur once: gathered, and their gradients summed on the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor.everywhere import Everywhere
from jaxpipe.layout.entries import Shared
from jaxpipe.layout.placement import Placement
from tests.compare import assert_close

rng = np.random.default_rng(0)
VALUES = {
    "rows": rng.normal(size=(6, 5)).astype(np.float32),
    "columns": rng.normal(size=(5, 3)).astype(np.float32),
    "whole": rng.normal(size=(5,)).astype(np.float32),
    "ids": np.arange(6, dtype=np.int32),
    "flag": np.arange(4) > 1,
}


def entry(ranks):
    cut = Placement((("pipe", 0),)), Placement((("pipe", 1),)), Placement(), Placement((("pipe", 0),)), Placement()
    if ranks == 1:
        cut = (Placement(),) * 5
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), VALUES)
    return Shared("00_Embed", 0, avals, dict(zip(VALUES, cut, strict=True)))


@pytest.mark.parametrize("ranks", [1, 3])
def test_gathered_whole_and_back_as_sums(ranks):
    mesh, shared = jaxpipe.make_mesh(pipe=ranks), entry(ranks)
    residence = Everywhere({"00_Embed": shared}, mesh)
    specs = jax.tree.map(lambda p: p.spec, shared.placements)

    def enter(stored):
        return jax.tree.map(lambda a: a[None], residence.enter_one(shared, stored))

    held = jax.jit(jax.shard_map(enter, mesh=mesh, in_specs=(specs,), out_specs=P("pipe"), check_vma=False))(VALUES)
    assert_close(held, jax.tree.map(lambda a: np.stack([a] * ranks), VALUES), 0, "every rank has all")
    assert residence.held_of(shared) == shared.params

    # Gradients of integers are zeros, as the sums begin.
    gradients = {
        name: rng.normal(size=(ranks, *a.shape)).astype(np.float32)
        if a.dtype == np.float32
        else np.zeros((ranks, *a.shape), a.dtype)
        for name, a in VALUES.items()
    }

    def leave(gradients):
        return residence.leave_one(shared, jax.tree.map(lambda a: a[0], gradients))

    found = jax.jit(jax.shard_map(leave, mesh=mesh, in_specs=P("pipe"), out_specs=specs, check_vma=False))(gradients)
    assert_close(found, jax.tree.map(lambda a: a.sum(0).astype(a.dtype), gradients), 1e-6)


def test_every_use_takes_all_and_adds_in_the_dtype_of_the_sums():
    residence = Everywhere({}, jaxpipe.make_mesh(pipe=2))
    held = {"w": jnp.arange(3.0)}
    assert residence.take_one(held, None, 4) is held
    found = residence.add_one(jnp.full(3, 256.0), None, 0, jnp.ones(3, jnp.bfloat16))
    assert found.dtype == jnp.float32 and (found == 257).all()
