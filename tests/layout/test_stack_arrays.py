"""One layer out of a stack, stacks out of layers: values, places, and what is asked for on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpipe
from jaxpipe.layout.stack_arrays import make_single, make_stack, take, take_on_rank, without_padding

P = PartitionSpec
MESH = jaxpipe.make_mesh(pipe=2, data=2, model=2)
WHOLE = np.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8)


@pytest.mark.parametrize("spec", [P("pipe"), P("pipe", None, "model"), P(("pipe",), None, None, ("data", "model"))])
def test_a_layer_lies_where_its_rank_is_and_is_cut_as_the_stack_is(spec):
    stack = jax.device_put(WHOLE, NamedSharding(MESH, spec))
    for rank, slot in np.ndindex(2, 3):
        found = take_on_rank(stack, rank, slot)
        assert (np.asarray(take(stack, rank, slot)) == np.asarray(found)).all()
        assert (np.asarray(found) == WHOLE[rank, slot]).all()
        assert found.sharding.device_set == set(MESH.devices[rank].flat)
        assert {shard.data.shape for shard in found.addressable_shards} == {
            tuple(
                size // {"model": 2, ("data", "model"): 4}.get(cut, 1)
                for size, cut in zip((4, 8), (*spec[2:], 0, 0), strict=False)
            )
        }


def test_layers_of_anything_else():
    elsewhere = [P(), P(None, None, "pipe"), P(("pipe", "data"))]
    whole = np.arange(4 * 4).reshape(4, 2, 2)
    for stack in [whole, jnp.asarray(whole), *(jax.device_put(whole, NamedSharding(MESH, spec)) for spec in elsewhere)]:
        assert (np.asarray(take(stack, 1, 1)) == whole[1, 1]).all()
    assert take(jax.ShapeDtypeStruct((4, 2, 3), jnp.int8), 0, 0) == jax.ShapeDtypeStruct((3,), jnp.int8)
    held = jax.device_put(WHOLE, NamedSharding(MESH, P("pipe")))
    for found in (jax.jit(lambda stack: take(stack, 1, 2))(held), jax.jit(lambda: take(held, 1, 2))()):
        assert (np.asarray(found) == WHOLE[1, 2]).all()


def test_stacks_are_made_rank_by_rank():
    asked = []

    def bring(place):
        return lambda needed: (asked.append((place, set(needed))), WHOLE[place])[1]

    sharding = NamedSharding(MESH, P("pipe", None, "data"))
    places = [(1, 0), (0, 2), (0, 0), (1, 1)]
    made = make_stack(WHOLE.shape, np.int32, sharding, {place: bring(place) for place in places})
    assert asked == [(place, {0}) for place in sorted(places)]
    assert made.sharding == sharding and made.dtype == np.int32
    for place in np.ndindex(2, 3):
        assert (np.asarray(made)[place] == (WHOLE[place] if place in places else 0)).all()


def test_padding_is_filled_with_zeros_and_cut_off():
    short = np.arange(1, 1 + 2 * 3 * 4 * 7).reshape(2, 3, 4, 7)
    sharding = NamedSharding(MESH, P("pipe", None, None, "data"))
    made = make_stack((2, 3, 4, 8), np.int32, sharding, {at: lambda _, at=at: short[at] for at in np.ndindex(2, 3)})
    assert made.sharding == sharding and not np.asarray(made)[..., 7].any()
    assert (np.asarray(take(made, 1, 2, (4, 7))) == short[1, 2]).all()
    assert take(jax.ShapeDtypeStruct(made.shape, made.dtype), 0, 0, (4, 7)).shape == (4, 7)
    numbers = make_stack((2, 3), np.int32, NamedSharding(MESH, P("pipe")), {(1, 2): lambda _: np.int32(7)})
    assert np.asarray(numbers).tolist() == [[0, 0, 0], [0, 0, 7]]
    single = make_single((4, 8), np.int32, NamedSharding(MESH, P(None, "data")), lambda _: short[0, 0])
    assert (np.asarray(without_padding(single, (4, 7))) == short[0, 0]).all() and not np.asarray(single)[:, 7].any()
    assert without_padding(single, (4, 8)) is single
    assert without_padding(jax.ShapeDtypeStruct((4, 8), np.int32), (4, 7)).shape == (4, 7)


def test_arrays_are_copies():
    """What the caller writes into an array later must not change the weights."""
    mine = _aligned((8, 1024))
    made = make_single(mine.shape, mine.dtype, NamedSharding(MESH, P()), lambda needed: mine)
    mine += 1
    assert not np.asarray(made).any()
    made = make_stack((2, 1, *mine.shape), mine.dtype, NamedSharding(MESH, P("pipe")), {(1, 0): lambda needed: mine})
    mine += 1
    assert np.asarray(made)[1, 0].max() == 1 and not np.asarray(made)[0].any()


def _aligned(shape):
    """Zeros in memory that JAX could use as it is, which needs 64 bytes of alignment on a CPU."""
    size = int(np.prod(shape)) * 4
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)
