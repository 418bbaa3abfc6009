"""Some arrays of layers replaced in a params tree, array by array, without making the others anew."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.layout.bring import Brought
from jaxpipe.layout.layout import SHARED, STACKED, Layout
from jaxpipe.layout.stack_arrays import make_single, make_stack, take
from jaxpipe.types import Params


def replaced(layout: Layout, mesh: Mesh, params: Params, arrays: Mapping[tuple[int, int], Any]) -> Params:
    """The params tree with some arrays replaced. Every process calls it, with the same arrays.

    Of a stack that holds such an array, one leaf at a time is on the devices twice.

    Args:
      params: on the mesh.
      arrays: by (layer, number among the leaves of the layer), in the shapes that the layer made.
    """
    where = layout.shardings(mesh)
    made: Params = {group: dict(entries) for group, entries in params.items()}
    for name, stack in layout.stacks.items():
        leaves, structure = jax.tree.flatten(params[STACKED][name])
        shardings, own = jax.tree.leaves(where[STACKED][name]), jax.tree.leaves(stack.params)
        for number in sorted({number for layer, number in arrays if layer in stack.places}):
            old = leaves[number]
            held = [
                arrays[layer, number] if (layer, number) in arrays else take(old, *place, own[number].shape)
                for layer, place in stack.places.items()
            ]
            brought = Brought(mesh, held)
            bring = {place: brought.leaf(each, 0) for each, place in enumerate(stack.places.values())}
            leaves[number] = make_stack(old.shape, old.dtype, shardings[number], bring)
        made[STACKED][name] = jax.tree.unflatten(structure, leaves)
    for name, shared in layout.shared.items():
        leaves, structure = jax.tree.flatten(params[SHARED][name])
        shardings = jax.tree.leaves(where[SHARED][name])
        for number in sorted(number for layer, number in arrays if layer == shared.layer):
            old, brought = leaves[number], Brought(mesh, [arrays[shared.layer, number]])
            leaves[number] = make_single(old.shape, old.dtype, shardings[number], brought.leaf(0, 0))
        made[SHARED][name] = jax.tree.unflatten(structure, leaves)
    return made
