"""Params of layers, wherever they lie, brought to the processes that need them, array by array."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from jaxpipe.errors import LayerError
from jaxpipe.processes.group import Group
from jaxpipe.types import Params

# Gives an array on the host of each of some processes, by their numbers. What the others get is not looked at.
Bring: TypeAlias = Callable[[Collection[int]], Any]


class Brought:
    """The leaves of the params of some layers.

    With several processes all of them make one, with the same layers, and ask for the same leaves in one order.

    Raises:
      LayerError: an array is on devices of processes that have none in the mesh.
    """

    def __init__(self, mesh: Mesh, layers: Sequence[Params]):
        self._group = Group.of(mesh)
        self._leaves = {layer: jax.tree.leaves(layers[layer]) for layer in range(len(layers))}
        order = [(layer, number) for layer, leaves in self._leaves.items() for number in range(len(leaves))]
        said = self._group.holders([self._leaves[layer][number] for layer, number in order])
        self._held = dict(zip(order, said, strict=True))
        if any(set(here) - set(self._group.members) for here in said):
            raise LayerError(
                "Some of these params lie on devices of processes that have none in the mesh. Bring them to all processes "
                "first: jaxpipe.fetch(layers), called by all processes."
            )

    def leaf(self, layer: int, number: int) -> Bring:
        """What brings one leaf of a layer."""
        array, held = self._leaves[layer][number], self._held[layer, number]
        return lambda needed: self._group.fetch(array, held, needed)
