"""Stacks stay where they are: taken and added to by slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.executor.stacked import Stacked
from jaxpipe.layout.entries import Stack
from jaxpipe.layout.layout import Address
from jaxpipe.layout.placement import Placement
from jaxpipe.layout.stages import Part
from jaxpipe.model.layers import Kind
from tests.compare import assert_close

SHAPES = {"w": jax.ShapeDtypeStruct((2,), jnp.float32), "ids": jax.ShapeDtypeStruct((), jnp.int32)}
STACK = Stack("block", 6, {}, SHAPES, jax.tree.map(lambda _: Placement(), SHAPES))
RESIDENCE = Stacked({"block": STACK}, jaxpipe.make_mesh(pipe=1))
KIND = Kind(lambda key, x: {}, lambda p, x: x)
HELD = {"w": np.arange(12, dtype=np.float32).reshape(6, 2), "ids": np.arange(6, dtype=np.int32) + 100}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "static"])
def test_take_and_add_by_repetition(count, traced):
    """Repetition r of a part of `count` layers that begins at slot 1 is slots 1 + r * count and on."""
    part = Part(KIND, 4, count, Address("stacked", "block"), slot=1)
    sums = np.ones((6, 2), np.float32)
    for repeat in range(2):
        index = jnp.int32(repeat) if traced else repeat
        here = slice(1 + repeat * count, 1 + (repeat + 1) * count)
        wanted = jax.tree.map(lambda a, here=here: a[here] if count > 1 else a[here][0], HELD)
        assert_close(RESIDENCE.take_one(jax.tree.map(jnp.asarray, HELD), part, index), wanted, 0)
        gradient = np.full(wanted["w"].shape, 10.0 + repeat, jnp.bfloat16)  # short floats are added to long ones
        found = RESIDENCE.add_one(jnp.asarray(sums), part, index, jnp.asarray(gradient))
        sums[here] += 10.0 + repeat
        assert_close(found, sums, 0)


def test_a_rank_holds_its_row():
    assert RESIDENCE.held_of(STACK) == {
        "w": jax.ShapeDtypeStruct((6, 2), jnp.float32),
        "ids": jax.ShapeDtypeStruct((6,), jnp.int32),
    }
    stored = jax.tree.map(lambda a: a[None], HELD)
    entered = RESIDENCE.enter_one(STACK, stored)
    assert_close(entered, HELD, 0)
    assert_close(RESIDENCE.leave_one(STACK, entered), stored, 0)
