"""What devices tell each other outside of the loop: sums of losses, metrics and gradients, values per row.

They are never inside a differentiated function: with unchecked varying axes the transpose of a psum multiplies gradients
by the size of the axis.
"""

import itertools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.mesh import DATA, PIPE, pipe_size
from jaxpipe.model.metrics import ADD, Joined
from jaxpipe.model.shapes import aval
from jaxpipe.model.values import raw, typed
from jaxpipe.types import Tree


def over(mesh: Mesh, *axes: str) -> tuple[str, ...]:
    """The given axes that are more than one device wide."""
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def total(tree: Tree, mesh: Mesh, *axes: str) -> Tree:
    """Sum over mesh axes."""
    axes = over(mesh, *axes)
    return jax.lax.psum(tree, axes) if axes else tree


def joined(sums: Tree, apart: Tree, place: jax.Array, mesh: Mesh, *axes: str) -> Any:
    """Sums over mesh axes, and what must stay apart (to take the largest of it, say), in one all-reduce.

    It takes one vector per dtype, in which each device has places of its own for the latter.

    Args:
      place: number of this device among those of the axes.

    Returns:
      The entries of `sums`, summed, and `apart` with a leading dim over the devices.
    """
    axes = over(mesh, *axes)
    if not axes:
        return (*sums, jax.tree.map(lambda a: a[None], apart))
    places = math.prod(mesh.shape[axis] for axis in axes)
    spread = jax.tree.map(lambda a: jnp.zeros((places, *a.shape), a.dtype).at[place].set(a), apart)
    leaves, structure = jax.tree.flatten((sums, spread))
    by_dtype: dict[Hashable, list[int]] = {}
    for index, leaf in enumerate(leaves):
        by_dtype.setdefault(leaf.dtype, []).append(index)
    packed = [jnp.concatenate([leaves[i].ravel() for i in group]) for group in by_dtype.values()]
    for group, vector in zip(by_dtype.values(), jax.lax.psum(packed, axes), strict=True):
        ends = list(itertools.accumulate(leaves[i].size for i in group))
        for i, part in zip(group, jnp.split(vector, ends[:-1]), strict=True):
            leaves[i] = part.reshape(leaves[i].shape)
    sums, spread = jax.tree.unflatten(structure, leaves)
    return (*sums, spread)


def metrics(
    sums: Tree, found: dict[str, Joined], place: jax.Array, mesh: Mesh, *axes: str
) -> tuple[Any, dict[str, Joined]]:
    """Sums over mesh axes and metrics joined over them, in one all-reduce.

    Args:
      found: the metrics by name, none of which keeps a value per row.
      place: as for `joined`.
    """
    added = {name: each.terms for name, each in found.items() if each.rule.join == ADD}
    extremes = {name: each.terms for name, each in found.items() if each.rule.join != ADD}
    sums, terms, apart = joined((sums, added), extremes, place, mesh, *axes)
    for name, each in apart.items():
        terms[name] = Joined(each, found[name].rule).over_first_dim().terms
    return sums, {name: Joined(terms[name], each.rule) for name, each in found.items()}


def from_rank(rank: int, tree: Tree, mesh: Mesh) -> Tree:
    """Gives every device the leaves [M, B, ...], of which a device of this rank has its rows, [M, rows, ...].

    They are gathered and not added to the zeros of the other ranks, so that they stay what they are, -0.0 too.
    """

    def one(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(jnp.int8) if leaf.dtype == bool else leaf
        if over(mesh, PIPE):
            wide = jax.lax.all_gather(wide, PIPE)[rank]
        if over(mesh, DATA):
            wide = jax.lax.all_gather(wide, DATA, axis=1, tiled=True)
        return wide.astype(leaf.dtype)

    return jax.tree.map(one, tree)


def deal(tree: Tree, mesh: Mesh) -> Tree:
    """Gives rank r entry r of the leaves [S, ...] that the last rank holds; those of all other ranks are zeros."""

    def one(leaf: jax.Array) -> jax.Array:
        plain = raw(leaf)
        wide = plain.astype(jnp.int8) if plain.dtype == bool else plain
        dealt = jax.lax.psum_scatter(wide, PIPE, scatter_dimension=0).astype(plain.dtype)
        return typed(dealt, aval(leaf))

    return jax.tree.map(one, tree) if pipe_size(mesh) > 1 else jax.tree.map(lambda a: a[0], tree)
