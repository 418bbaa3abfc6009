"""Which layers are alike, which of those are a stack, and what they are called."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpipe.errors import LayerError
from jaxpipe.layout.piles import LikeLayers, piled
from jaxpipe.layout.placement import Placement
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.shapes import describe, signature
from jaxpipe.types import Avals, KeyPath, Tree

# How the compiler is to cut one leaf of a layer over further axes of the mesh, for the dims that the layer made:
# `own_spec(layer, path in its params, shape and dtype)`. None, or an empty spec, cuts nothing.
OwnSpec: TypeAlias = Callable[[int, KeyPath, jax.ShapeDtypeStruct], PartitionSpec | None]


def check_params(module: PipelineModule, params: Sequence[Avals]) -> None:
    """Raises LayerError if params of a layer, by their shapes, cannot be stored."""
    for index, held in enumerate(params):
        owner = module.owners[index]
        if owner != index and jax.tree.leaves(held):
            raise LayerError(
                f"{module.label(index)} was given params, but it is tied to {module.label(owner)}, which "
                "holds them: give an empty dict for every later use of a tie."
            )
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in jax.tree.leaves(held)):
            raise LayerError(f"{module.label(index)} has a PRNG key among its params: {describe(held)}.")


def further_cuts(index: int, params: Avals, own_spec: OwnSpec | None) -> Tree:
    """For each leaf of a layer, the placement over further axes."""

    def one(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> Placement:
        spec = own_spec(index, path, leaf) if own_spec is not None else None
        cuts = [
            (axis, dim)
            for dim, named in enumerate(spec or ())
            for axis in ((named,) if isinstance(named, str) else named or ())
        ]
        return Placement(tuple(cuts))

    return jax.tree_util.tree_map_with_path(one, params)


def kinds(
    module: PipelineModule,
    params: Sequence[Avals],
    computed: Sequence[Avals],
    further: Sequence[Tree],
    frozen: Sequence[frozenset[int]],
) -> list[list[int]]:
    """The layers that own weights, like ones together.

    Args:
      params, computed: of each layer, as they are stored and as they are computed with.
      further: the placement of each leaf over further axes.
      frozen: of each layer the numbers of the leaves that are not trained.
    """
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(module.layers):
        if module.owners[index] == index and jax.tree.leaves(params[index]):
            alone = index if layer.tie is not None else -1  # a tied layer is never stacked
            placed = tuple(jax.tree.leaves(further[index]))
            shapes = signature(params[index]), signature(computed[index])
            # Frozen params have no sums of gradients, so that all layers of a stack have the same ones frozen.
            found.setdefault((layer.kind, shapes, placed, frozen[index], alone), []).append(index)
    return list(found.values())


def piles(
    kinds: Sequence[Sequence[int]], params: Sequence[Avals], further: Sequence[Tree], users: Sequence[Collection[int]]
) -> list[bool]:
    """Per kind of layers, whether it is a pile.

    Args:
      users: of each layer, the ranks that use its weights.
    """
    ranks = 1 + max(max(used) for used in users)
    single, several, found = [0] * ranks, dict[int, LikeLayers](), [False] * len(kinds)
    for number, members in enumerate(kinds):
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params[members[0]]))
        if any(placement.cuts for placement in jax.tree.leaves(further[members[0]])):
            continue  # what a further axis cuts cannot lie end to end
        if len(members) > 1:
            counts = [0] * ranks
            for index in members:
                counts[min(users[index])] += 1
            several[number] = LikeLayers(size, tuple(counts))
        elif len(users[members[0]]) == 1:
            single[min(users[members[0]])] += size
    for number, pile in zip(several, piled(list(several.values()), single), strict=True):
        found[number] = pile
    return found


def places(members: Sequence[int], homes: Sequence[int]) -> tuple[int, dict[int, tuple[int, int]]]:
    """How many slots the fullest rank needs for some layers, and of each its (rank, slot).

    Args:
      homes: the rank of each layer.
    """
    used: dict[int, int] = {}
    found: dict[int, tuple[int, int]] = {}
    for index in members:
        rank = homes[index]
        found[index] = rank, used.get(rank, 0)
        used[rank] = used.get(rank, 0) + 1
    return max(used.values()), found
