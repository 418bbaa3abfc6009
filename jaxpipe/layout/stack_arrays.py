"""Arrays of stacks [S, slots, ...]: one layer taken out, and stacks and single arrays made out of those of layers.

Nothing here holds more on a device than belongs there, and on the host no more than one array, or what one rank holds of
one. With several processes each makes the part that its devices hold, and all of them call the same functions in one order.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.layout.bring import Bring, Brought
from jaxpipe.layout.entries import Shared, Stack
from jaxpipe.layout.placement import fit
from jaxpipe.mesh import PIPE, rank_mesh
from jaxpipe.processes.group import settled
from jaxpipe.types import Params, Shape

P = PartitionSpec


def take(stack: Any, rank: int, slot: int, shape: Shape | None = None) -> Any:
    """Copies one layer [...] out of a stack [S, slots, ...].

    Where the devices of the stack are in several processes, the copy is on those of the rank that holds the layer. In one
    process it is what indexing gives, on all devices of the stack, so that users can compute with several layers at once.

    The stack may also be a tracer, a NumPy array or a ShapeDtypeStruct; then the result is of the same kind.

    Args:
      shape: of the layer, if the stack is padded along its dims; None: it is not.
    """
    shape = tuple(stack.shape[2:]) if shape is None else shape
    if isinstance(stack, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, stack.dtype)
    if not isinstance(stack, jax.Array) or isinstance(stack, Tracer) or stack.is_fully_addressable:
        return fit(stack[rank, slot], shape)
    return without_padding(take_on_rank(stack, rank, slot), shape)


def take_on_rank(stack: jax.Array, rank: int, slot: int) -> jax.Array:
    """A copy of one layer, padding included, on the devices of the rank that holds it, of a stack cut over the ranks.

    Of a stack that is not, as a computation outside of the pipeline may leave it, it is what indexing gives.
    """
    sharding = stack.sharding
    if not isinstance(sharding, NamedSharding) or (*sharding.spec, None, None)[:2] not in (
        (PIPE, None),
        ((PIPE,), None),
    ):
        return stack[rank, slot]
    assert isinstance(sharding.mesh, Mesh)
    mesh = rank_mesh(sharding.mesh, rank)
    devices = set(mesh.devices.flat)
    parts = [_in_slot(shard.data, slot) for shard in stack.addressable_shards if shard.device in devices]
    if any(isinstance(part, Tracer) for part in parts):  # inside of a caller's jit
        return stack[rank, slot]
    where = NamedSharding(mesh, P(*sharding.spec[2:]), memory_kind=sharding.memory_kind)
    return jax.make_array_from_single_device_arrays(stack.shape[2:], where, parts, dtype=stack.dtype)


def without_padding(array: Any, shape: Shape) -> Any:
    """The beginning of an array that is longer in storage than the layer made it; itself if it is not.

    With several processes those that hold a part of it call this. A dim that was padded is not cut any more.
    """
    if array.shape == shape or not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return fit(array, shape)
    if array.is_fully_addressable or not isinstance(array.sharding, NamedSharding):
        return fit(array, shape)
    spec = [
        cut if stored == size else None
        for cut, stored, size in zip((*array.sharding.spec, *[None] * len(shape)), array.shape, shape, strict=False)
    ]
    where = NamedSharding(array.sharding.mesh, P(*spec))
    if not array.addressable_shards:  # other processes hold all of it
        return jax.make_array_from_single_device_arrays(shape, where, [], dtype=array.dtype)
    return settled(_cut_off(shape, where)(array))


@functools.lru_cache(maxsize=256)
def _cut_off(shape: Shape, where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda a: fit(a, shape), out_shardings=where)


@jax.jit
def _in_slot(part: jax.Array, slot: int) -> jax.Array:
    """[...] of [1, slots, ...]; the slot is an argument, so that all of them are one program."""
    return jax.lax.dynamic_index_in_dim(part[0], slot, keepdims=False)


def stack_of_layers(stack: Stack, shardings: Params, num_ranks: int, brought: Brought) -> Params:
    """The arrays of a stack on the mesh, made of those of its layers, one after the other."""
    targets, structure = jax.tree.flatten(stack.stored)
    made = [
        make_stack(
            (num_ranks, stack.slots, *target.shape),
            target.dtype,
            sharding,
            {place: brought.leaf(layer, number) for layer, place in stack.places.items()},
        )
        for number, (target, sharding) in enumerate(zip(targets, jax.tree.leaves(shardings), strict=True))
    ]
    return jax.tree.unflatten(structure, made)


def single_of_layer(shared: Shared, shardings: Params, brought: Brought) -> Params:
    """The arrays of a layer that is stored on its own, on the mesh, one after the other."""
    targets, structure = jax.tree.flatten(shared.stored)
    made = [
        make_single(target.shape, target.dtype, sharding, brought.leaf(shared.layer, number))
        for number, (target, sharding) in enumerate(zip(targets, jax.tree.leaves(shardings), strict=True))
    ]
    return jax.tree.unflatten(structure, made)


def make_stack(shape: Shape, dtype: Any, sharding: NamedSharding, layers: Mapping[tuple[int, int], Bring]) -> jax.Array:
    """A stack [S, slots, ...] on the mesh, each rank its own, zeros where there is no layer.

    Args:
      shape: of the stack, [S, slots, ...]; what is longer than the arrays of the layers is filled with zeros.
      sharding: cuts the stack over the ranks, and each rank has one entry.
      layers: by (rank, slot).
    """
    assert isinstance(sharding.mesh, Mesh)
    index_of = sharding.addressable_devices_indices_map(shape)
    parts = []
    for rank in range(shape[0]):
        devices = list(rank_mesh(sharding.mesh, rank).devices.flat)
        mine = [device for device in devices if device in index_of]
        whole = np.zeros((1, *shape[1:]) if mine else (0, 0), dtype)
        for (_, slot), bring in sorted(
            (item for item in layers.items() if item[0][0] == rank), key=lambda item: item[0]
        ):
            found = bring({device.process_index for device in devices})
            if mine:
                whole[0, slot, *map(slice, np.shape(found))] = found
        for device in mine:
            index = index_of[device]
            assert index is not None
            parts.append(_on_device(whole[:, *index[1:]], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)


def make_single(shape: Shape, dtype: Any, sharding: NamedSharding, bring: Bring) -> jax.Array:
    """An array of one layer on the mesh; what the shape has more than the array is filled with zeros."""
    found = bring({device.process_index for device in sharding.device_set})
    indices = sharding.addressable_devices_indices_map(shape).items()
    if indices:
        found = fit(np.asarray(found), shape)
    # Copies, because on a CPU the array of JAX is the memory of NumPy, where it may be, whatever `may_alias` says. The
    # caller can write into that.
    parts = [_on_device(np.array(found[index], dtype), device) for device, index in indices]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)


def _on_device(array: np.ndarray, device: Any) -> jax.Array:
    """Puts an array that nobody will write into on a device, and waits for it."""
    return jax.block_until_ready(jax.device_put(array, device))
