"""What travels between ranks: every permute needs one shape on all ranks, while stages may pass different things."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.model.shapes import aval, signature

Tree = Any
Wire = list[jax.Array]


class Codec:
    """Turns the trees that cross stage boundaries into one list of arrays, and back.

    If all boundaries agree, the list is the leaves as they are. Otherwise the leaves are laid end to end, one vector per
    dtype, as long as the largest boundary needs.

    Args:
      boundaries: the abstract values (ShapeDtypeStruct leaves) that cross each boundary.
    """

    def __init__(self, boundaries: Sequence[Tree]):
        self.uniform = len({signature(b) for b in boundaries}) <= 1
        self.spec: list[jax.ShapeDtypeStruct] = []
        if not boundaries:
            return
        if self.uniform:
            self.spec = [aval(leaf) for leaf in jax.tree.leaves(boundaries[0])]
            return
        lengths: dict[Any, int] = {}
        for boundary in boundaries:
            for dtype, leaves in _by_dtype(jax.tree.leaves(boundary)).items():
                lengths[dtype] = max(lengths.get(dtype, 0), sum(math.prod(leaf.shape) for _, leaf in leaves))
        self.spec = [jax.ShapeDtypeStruct((length,), dtype) for dtype, length in lengths.items()]

    def encode(self, tree: Tree) -> Wire:
        """Leaves of a tree -> what is sent."""
        leaves = jax.tree.leaves(tree)
        if self.uniform:
            return leaves
        groups = _by_dtype(leaves)
        wire = []
        for spec in self.spec:
            flat = [jnp.ravel(leaf) for _, leaf in groups.get(spec.dtype, [])]
            used = sum(part.size for part in flat)
            wire.append(jnp.concatenate([*flat, jnp.zeros(spec.shape[0] - used, spec.dtype)]))
        return wire

    def decode(self, wire: Wire, like: Tree) -> Tree:
        """What was received -> the tree of the boundary whose abstract values are `like`."""
        wanted, structure = jax.tree.flatten(like)
        if self.uniform:
            return jax.tree.unflatten(structure, wire)
        vectors = {spec.dtype: vector for spec, vector in zip(self.spec, wire, strict=True)}
        leaves: list[Any] = [None] * len(wanted)
        for dtype, group in _by_dtype(wanted).items():
            start = 0
            for index, leaf in group:
                size = math.prod(leaf.shape)
                leaves[index] = vectors[dtype][start : start + size].reshape(leaf.shape)
                start += size
        return jax.tree.unflatten(structure, leaves)


def _by_dtype(leaves: Sequence[Any]) -> dict[Any, list[tuple[int, Any]]]:
    groups: dict[Any, list[tuple[int, Any]]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append((index, leaf))
    return groups
