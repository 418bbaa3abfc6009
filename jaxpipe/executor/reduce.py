"""Every collective outside the loop: gathering shared params before it, reducing losses and gradients after it.

Losses and gradients are reduced here, once per step, and never inside a differentiated function: with unchecked varying
axes the transpose of a psum multiplies gradients by the size of the axis.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.executor.unit import split_inexact
from jaxpipe.mesh import DATA, PIPE, pipe_size
from jaxpipe.model.layout import Layout
from jaxpipe.model.shapes import aval, is_inexact
from jaxpipe.model.values import raw, typed
from jaxpipe.types import Params, Tree


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
    by_dtype: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        by_dtype.setdefault(leaf.dtype, []).append(index)
    packed = [jnp.concatenate([leaves[i].ravel() for i in group]) for group in by_dtype.values()]
    for group, vector in zip(by_dtype.values(), jax.lax.psum(packed, axes), strict=True):
        ends = list(itertools.accumulate(leaves[i].size for i in group))
        for i, part in zip(group, jnp.split(vector, ends[:-1]), strict=True):
            leaves[i] = part.reshape(leaves[i].shape)
    sums, spread = jax.tree.unflatten(structure, leaves)
    return (*sums, spread)


def deal(tree: Tree, mesh: Mesh) -> Tree:
    """Gives rank r entry r of the leaves [S, ...] that the last rank holds; those of all other ranks are zeros."""

    def one(leaf: jax.Array) -> jax.Array:
        plain = raw(leaf)
        wide = plain.astype(jnp.int8) if plain.dtype == bool else plain
        dealt = jax.lax.psum_scatter(wide, PIPE, scatter_dimension=0).astype(plain.dtype)
        return typed(dealt, aval(leaf))

    return jax.tree.map(one, tree) if pipe_size(mesh) > 1 else jax.tree.map(lambda a: a[0], tree)


def assemble(layout: Layout, params: Params) -> Params:
    """A rank's params, from its part of the stored ones: its row of each stack, and all of each shared layer."""

    def gather(leaf: jax.Array, dim: int) -> jax.Array:
        return jax.lax.all_gather(leaf, PIPE, axis=dim, tiled=True) if dim >= 0 else leaf

    return {
        "stacked": {name: jax.tree.map(lambda a: a[0], params["stacked"][name]) for name in layout.stacks},
        "shared": {n: jax.tree.map(gather, params["shared"][n], s.split) for n, s in layout.shared.items()},
    }


def disassemble(layout: Layout, mesh: Mesh, grads: Params, counted: jax.Array | None = None) -> Params:
    """The transpose of `assemble`: sums a rank's gradients over data ranks, and those of shared layers over ranks too
    (which is what tied weights need).

    Args:
      counted: if false, all gradients are zeros, whatever they were (zero times infinity, say); None: as they are.
    """

    def scatter(leaf: jax.Array, dim: int) -> jax.Array:
        if pipe_size(mesh) == 1:
            return leaf
        if not is_inexact(leaf):  # no gradient: zeros, like the accumulator they come from
            return jax.lax.slice_in_dim(leaf, 0, leaf.shape[dim] // pipe_size(mesh), axis=dim) if dim >= 0 else leaf
        if dim < 0:
            return jax.lax.psum(leaf, PIPE)
        return jax.lax.psum_scatter(leaf, PIPE, scatter_dimension=dim, tiled=True)

    stored = {
        "stacked": {name: jax.tree.map(lambda a: a[None], grads["stacked"][name]) for name in layout.stacks},
        "shared": {n: jax.tree.map(scatter, grads["shared"][n], s.split) for n, s in layout.shared.items()},
    }
    leaves, rebuild = split_inexact(stored)
    leaves = total(leaves, mesh, DATA)
    if counted is not None:
        leaves = [jnp.where(counted, leaf, jnp.zeros_like(leaf)) for leaf in leaves]
    return jax.tree.map(lambda g, a: g.astype(a.dtype), rebuild(leaves), layout.shapes())
