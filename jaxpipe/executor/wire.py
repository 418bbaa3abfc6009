"""What travels between ranks: every permute needs one shape on all ranks, while stages may pass different things."""

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxpipe.model.shapes import avals, describe, signature
from jaxpipe.model.values import raw, raw_aval, typed
from jaxpipe.types import Leaves, Tree

Wire = list[jax.Array]
Array = TypeVar("Array", jax.Array, jax.ShapeDtypeStruct)


class Codec:
    """Turns the trees that cross stage boundaries into one list of arrays, and back.

    If all boundaries agree, the list is the leaves as they are. Otherwise the leaves are laid end to end, one vector per
    dtype, as long as the largest boundary needs. PRNG keys travel as their words.

    Args:
      boundaries: the abstract values (ShapeDtypeStruct leaves) that cross each boundary.
    """

    def __init__(self, boundaries: Sequence[Tree]):
        self.uniform = len({signature(b) for b in boundaries}) <= 1
        self.spec: list[jax.ShapeDtypeStruct] = []
        self._known = {signature(b) for b in boundaries}
        if not boundaries:
            return
        if self.uniform:
            self.spec = _raw_avals(boundaries[0])
            return
        lengths: dict[Hashable, int] = {}
        for boundary in boundaries:
            for dtype, leaves in _by_dtype(_raw_avals(boundary)).items():
                lengths[dtype] = max(lengths.get(dtype, 0), sum(math.prod(leaf.shape) for _, leaf in leaves))
        self.spec = [jax.ShapeDtypeStruct((length,), dtype) for dtype, length in lengths.items()]

    def encode(self, tree: Tree) -> Wire:
        """Leaves of a tree -> what is sent."""
        assert signature(tree) in self._known, f"{describe(tree)} crosses no boundary: it would be cut or padded"
        leaves = [raw(leaf) for leaf in jax.tree.leaves(tree)]
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
        assert signature(like) in self._known, f"{describe(like)} crosses no boundary"
        wanted, structure = jax.tree.flatten(avals(like))
        if self.uniform:
            return jax.tree.unflatten(structure, [typed(a, b) for a, b in zip(wire, wanted, strict=True)])
        vectors = {spec.dtype: vector for spec, vector in zip(self.spec, wire, strict=True)}
        leaves: Leaves = [None] * len(wanted)
        for dtype, group in _by_dtype([raw_aval(leaf) for leaf in wanted]).items():
            start = 0
            for index, leaf in group:
                size = math.prod(leaf.shape)
                leaves[index] = typed(vectors[dtype][start : start + size].reshape(leaf.shape), wanted[index])
                start += size
        return jax.tree.unflatten(structure, leaves)


def _raw_avals(tree: Tree) -> list[jax.ShapeDtypeStruct]:
    return [raw_aval(leaf) for leaf in jax.tree.leaves(avals(tree))]


def _by_dtype(leaves: Sequence[Array]) -> dict[Hashable, list[tuple[int, Array]]]:
    groups: dict[Hashable, list[tuple[int, Array]]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append((index, leaf))
    return groups
