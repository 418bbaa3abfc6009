"""Who writes which item of a checkpoint, and who reads it, where several processes hold the devices of a mesh.

Every item is written once. A layer of a stack is written by a process that holds all of it. All other items may have arrays
that are cut over several processes: those are gathered first, array by array, and the processes take turns in writing such
items.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.mesh import PIPE
from jaxpipe.processes.group import Group, holders_of
from jaxpipe.types import AnyArray

Item = TypeVar("Item")


class Shares:
    """The part of this process in the checkpoints of a state on a mesh.

    Args:
      within: the axes over which the devices of one rank hold different parts of its layers.

    Attributes:
      group: the processes that hold devices of the mesh.
      holders: for each rank, the processes that hold devices of it.
      writers: for each rank, the processes that hold all parts of its layers; there may be none.
    """

    def __init__(self, mesh: Mesh, within: Collection[str] = ()):
        self.group, self._mesh = Group.of(mesh), mesh
        owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
        axes = [PIPE, *(axis for axis in mesh.axis_names if axis in within and axis != PIPE)]
        by_part = np.moveaxis(owners, [mesh.axis_names.index(axis) for axis in axes], range(len(axes)))
        parts = by_part.reshape(len(by_part), math.prod(by_part.shape[1 : len(axes)]), -1)
        self.holders = [sorted({int(owner) for owner in rank.flat}) for rank in parts]
        self.writers = [
            [owner for owner in holders if (rank == owner).any(axis=1).all()]
            for rank, holders in zip(parts, self.holders, strict=True)
        ]

    def holds(self, rank: int) -> bool:
        """Whether this process holds devices of a rank."""
        return self.group.me in self.holders[rank]

    def writes(self, rank: int, number: int) -> bool:
        """Whether this process writes an item that lies on a rank; those who hold it take turns by the item's number."""
        writers = self.writers[rank]
        return writers[number % len(writers)] == self.group.me

    def rounds(self, items: list[Item]) -> Iterator[tuple[list[Item], Item | None]]:
        """Deals items that all processes have to gather: yields (next items, the one of them that this process writes).

        Each process has at most one of the next items, so that all write at the same time before they gather the next ones.
        """
        members = self.group.members
        for start in range(0, len(items), len(members)):
            dealt = items[start : start + len(members)]
            mine = members.index(self.group.me)
            yield dealt, dealt[mine] if mine < len(dealt) else None

    def whole(self, array: jax.Array) -> AnyArray:
        """The whole of an array on devices of the mesh, which may be cut over several processes; all of them call it, in
        the same order.

        With one process it is the array as it is. With several it is on the host, and on the devices no longer.
        """
        if not self.group.several:
            return array
        if array.sharding.device_set != set(self._mesh.devices.flat):  # those of a rank; it goes by way of all devices
            return self.group.fetch(array, holders_of(array))
        if not array.is_fully_replicated:
            array = _gather(self._mesh)(array)
        return np.asarray(array.addressable_data(0))


@functools.lru_cache(maxsize=16)
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, PartitionSpec()))
