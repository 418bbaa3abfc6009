"""Weights that are cut over the data ranks: gathered once before the loop, and their gradients scattered once behind it.

Large arrays travel one by one, so that the compiler can begin with those that are needed first, and needs no room to put
them together. Small ones of one dtype travel together, because a collective has a cost of its own.
"""

import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.executor import along, reduce
from jaxpipe.layout.on_mesh import left_to_the_compiler
from jaxpipe.layout.placement import Placement
from jaxpipe.mesh import DATA, data_size
from jaxpipe.model.shapes import is_inexact

# Arrays of fewer elements travel together: to move so few once more, in order to put them side by side, costs little.
SMALL = 1 << 16


def gathered(pieces: Sequence[jax.Array], placements: Sequence[Placement], mesh: Mesh) -> list[jax.Array]:
    """Arrays that no data rank holds a part of, from the parts; those that are not cut stay as they are. In `shard_map`."""
    found, count = list(pieces), data_size(mesh)
    dims = {i: dim for i, placement in enumerate(placements) if (dim := placement.dim(DATA)) is not None}
    for together in _groups([(i, pieces[i], placements[i]) for i in dims], count):
        if len(together) == 1:
            (one,) = together
            found[one] = along.gathered(pieces[one], DATA, placements[one])
            continue
        flat = jax.lax.all_gather(jnp.concatenate([pieces[i].ravel() for i in together]), DATA)
        start = 0
        for i in together:
            part = flat[:, start : start + pieces[i].size].reshape(count, *pieces[i].shape)
            found[i] = joined(part, dims[i])
            start += pieces[i].size
    return found


def scattered(wholes: Sequence[jax.Array], placements: Sequence[Placement], mesh: Mesh) -> list[jax.Array]:
    """The sums of arrays over the data ranks, of which each keeps the part that it stores: the transpose of `gathered`.

    Arrays without derivatives are not summed; of those, too, a part is kept.
    """
    found, count = list(wholes), data_size(mesh)
    dims = {i: dim for i, placement in enumerate(placements) if (dim := placement.dim(DATA)) is not None}
    summed = [i for i, whole in enumerate(wholes) if is_inexact(whole) and i not in dims]
    for i, total in zip(summed, reduce.total([wholes[i] for i in summed], mesh, DATA), strict=True):
        found[i] = total
    for i, dim in dims.items():
        if not is_inexact(wholes[i]):  # there is no gradient: zeros, of which any part will do
            found[i] = jax.lax.slice_in_dim(wholes[i], 0, wholes[i].shape[dim] // count, axis=dim)
    for together in _groups([(i, wholes[i], placements[i]) for i in dims if is_inexact(wholes[i])], 1):
        if len(together) == 1:
            (one,) = together
            found[one] = along.scattered(wholes[one], DATA, placements[one])
            continue
        cut_up = {i: apart(wholes[i], dims[i], count) for i in together}
        rows = jnp.concatenate([part.reshape(count, -1) for part in cut_up.values()], axis=1)
        flat, start = jax.lax.psum_scatter(rows, DATA, scatter_dimension=0), 0
        for i, part in cut_up.items():
            size = part.size // count
            found[i] = flat[start : start + size].reshape(part.shape[1:])
            start += size
    return found


def _groups(arrays: Sequence[tuple[int, jax.Array, Placement]], count: int) -> list[list[int]]:
    """Which arrays travel together, of (number, array, placement); `count` of the arrays are a whole.

    Those that the compiler cuts over further axes travel alone: it would bring their parts together first.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, array, placement in arrays:
        further = left_to_the_compiler(placement).cuts
        groups.setdefault(i if further or array.size * count >= SMALL else array.dtype, []).append(i)
    return list(groups.values())


def joined(parts: jax.Array, dim: int) -> jax.Array:
    """[count, ..., n, ...] as [..., count * n, ...], the parts side by side along a dim of each."""
    moved = jnp.moveaxis(parts, 0, dim)
    shape = moved.shape
    return moved.reshape(*shape[:dim], math.prod(shape[dim : dim + 2]), *shape[dim + 2 :])


def apart(whole: jax.Array, dim: int, count: int) -> jax.Array:
    """The inverse of `joined`."""
    shape = whole.shape
    return jnp.moveaxis(whole.reshape(*shape[:dim], count, shape[dim] // count, *shape[dim + 1 :]), dim, 0)
