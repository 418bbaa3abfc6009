"""The state of layers during a step: changed in place by the ops, averaged over data ranks at the end.

A rank holds its row of each stack [slots, ...], and every layer that is stored on its own; of the latter only the rank that
runs the layer changes them, and tells the others after the loop. What no layer changes is read where it is, and comes out
as it went in, bit for bit.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.executor import reduce
from jaxpipe.executor.further_cuts import FurtherCuts
from jaxpipe.executor.residence import Repeat
from jaxpipe.layout.layout import SHARED, STACKED, Address
from jaxpipe.layout.stages import Part, Stage
from jaxpipe.layout.state_layout import StateLayout
from jaxpipe.mesh import DATA, PIPE, data_size
from jaxpipe.model.shapes import sum_dtype
from jaxpipe.types import Avals, Tree


class States:
    """What a rank holds of the state of the layers, in the structure of the tree of states.

    Args:
      layout: of that tree.
      mesh: the devices.
      stages: the stages of the step, which say what is changed.
    """

    def __init__(self, layout: StateLayout, mesh: Mesh, stages: Sequence[Stage]):
        self.layout, self.mesh = layout, mesh
        self._further = FurtherCuts(layout, mesh, [])
        self._changes: dict[Address, tuple[bool, ...]] = {}
        places = [part.state for stage in stages for part in stage.parts if part.state is not None]
        for place in places:
            before = self._changes.get(place.address, place.changes)
            self._changes[place.address] = tuple(a or b for a, b in zip(before, place.changes, strict=True))

    def avals(self) -> Avals:
        """Abstract values of what a rank holds."""
        shapes = self.layout.shapes()
        row = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), shapes[STACKED])
        return {STACKED: row, SHARED: shapes[SHARED]}

    def enter(self, stored: Tree) -> Tree:
        """What a rank holds, from its part of what is stored; inside `shard_map`."""
        return {STACKED: jax.tree.map(lambda a: a[0], stored[STACKED]), SHARED: stored[SHARED]}

    def leave(self, held: Tree, rank: jax.Array, data_rank: jax.Array) -> Tree:
        """What is stored, from what the ranks hold after a step; inside `shard_map`.

        Floats are averaged over the data ranks, everything else is that of data rank 0.
        """

        def summand(leaf: jax.Array, counts: jax.Array | bool) -> jax.Array:
            wide = leaf.astype(jnp.int8) if leaf.dtype == bool else leaf.astype(sum_dtype(leaf.dtype))
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                wide = wide / data_size(self.mesh)
            else:
                counts = counts & (data_rank == 0)
            return jnp.where(counts, wide, jnp.zeros_like(wide))

        def one_group(group: str, *axes: str) -> Tree:
            leaves, structure = jax.tree.flatten(held[group])
            changed: list[bool] = []
            owners: list[jax.Array | bool] = []
            for name, tree in held[group].items():
                count = len(jax.tree.leaves(tree))
                flags = self._changes.get(Address(group, name), (False,) * count)
                own = group == STACKED or rank == self.layout.rank_of(self.layout.shared[name].layer)
                changed += flags
                owners += [own] * count
            chosen = [n for n, flag in enumerate(changed) if flag]
            # All in one: they are many, and small.
            summed = reduce.total([summand(leaves[n], owners[n]) for n in chosen], self.mesh, *axes)
            for n, leaf in zip(chosen, summed, strict=True):
                leaves[n] = leaf.astype(leaves[n].dtype)
            return jax.tree.unflatten(structure, leaves)

        stacked = jax.tree.map(lambda a: a[None], one_group(STACKED, DATA))
        return self._further.stored({STACKED: stacked, SHARED: one_group(SHARED, PIPE, DATA)})


def take(held: Tree, part: Part, repeat: Repeat) -> Tree:
    """The state that repetition `repeat` of a part starts from; a leading dim of `part.count` if that is not 1."""
    if part.state is None:
        return {}
    group, name = part.state.address
    if group == SHARED:
        return held[group][name]
    at = part.state.slot + repeat * part.count
    if part.count == 1:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), held[group][name])
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, part.count), held[group][name])


def put(held: Tree, part: Part, repeat: Repeat, new: Tree) -> Tree:
    """What a rank holds, with what one repetition of a part has made of its state, in place as XLA sees it."""
    if part.state is None or not any(part.state.changes):
        return held
    group, name = part.state.address
    leaves, structure = jax.tree.flatten(held[group][name])
    at = None if group == SHARED else part.state.slot + repeat * part.count

    def one(old: jax.Array, made: jax.Array) -> jax.Array:
        if at is None:
            return made
        return jax.lax.dynamic_update_slice_in_dim(old, made if part.count > 1 else made[None], at, 0)

    after = [
        one(old, made) if changed else old
        for old, made, changed in zip(leaves, jax.tree.leaves(new), part.state.changes, strict=True)
    ]
    return {**held, group: {**held[group], name: jax.tree.unflatten(structure, after)}}
