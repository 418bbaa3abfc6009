"""What travels between ranks: every permute needs one shape on all ranks, while stages may pass different things."""

import math
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

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
    dtype, as long as the largest boundary needs. If that is more than any boundary needs by itself, because one has more of
    one dtype and one more of another, the bits of all dtypes are laid into one vector of words. PRNG keys travel as their
    words.

    Args:
      boundaries: the abstract values (ShapeDtypeStruct leaves) that cross each boundary.
    """

    def __init__(self, boundaries: Sequence[Tree]):
        self.uniform = len({signature(b) for b in boundaries}) <= 1
        self.words = False
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
        words = [_words_of(_raw_avals(boundary)) for boundary in boundaries]
        if all(map(_has_words, lengths)) and 4 * max(words) < sum(a.shape[0] * a.dtype.itemsize for a in self.spec):
            self.words, self.spec = True, [jax.ShapeDtypeStruct((max(words),), jnp.uint32)]

    def encode(self, tree: Tree) -> Wire:
        """Leaves of a tree -> what is sent."""
        assert signature(tree) in self._known, f"{describe(tree)} crosses no boundary: it would be cut or padded"
        leaves = [raw(leaf) for leaf in jax.tree.leaves(tree)]
        if self.uniform:
            return leaves
        groups = _by_dtype(leaves)
        if self.words:
            flat = [_as_words(jnp.concatenate([jnp.ravel(leaf) for _, leaf in group])) for group in groups.values()]
            rest = self.spec[0].shape[0] - sum(part.size for part in flat)
            return [jnp.concatenate([*flat, jnp.zeros(rest, jnp.uint32)])]
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
        groups = _by_dtype([raw_aval(leaf) for leaf in wanted])
        if self.words:
            vectors, start = dict[Hashable, jax.Array](), 0
            for dtype, group in groups.items():
                count = sum(math.prod(leaf.shape) for _, leaf in group)
                stop = start + _num_words(count, group[0][1].dtype.itemsize)
                vectors[dtype] = _from_words(wire[0][start:stop], group[0][1].dtype, count)
                start = stop
        else:
            vectors = {spec.dtype: vector for spec, vector in zip(self.spec, wire, strict=True)}
        leaves: Leaves = [None] * len(wanted)
        for dtype, group in groups.items():
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


# Numbers of less than a byte, which `itemsize` does not say.
_NO_BYTES = ("int2", "uint2", "int4", "uint4", "float4_e2m1fn")


def _has_words(dtype: Any) -> bool:
    """Whether arrays of this dtype are whole bytes that can be read as words."""
    return not jnp.issubdtype(dtype, jnp.complexfloating) and jnp.dtype(dtype).name not in _NO_BYTES


def _num_words(count: int, itemsize: int) -> int:
    return -(-count * itemsize // 4)


def _words_of(leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
    groups = _by_dtype(leaves).values()
    return sum(_num_words(sum(math.prod(a.shape) for _, a in group), group[0][1].dtype.itemsize) for group in groups)


def _as_words(vector: jax.Array) -> jax.Array:
    """The bits of [n] as uint32 [words], the last one filled with zeros."""
    if vector.dtype == bool:
        vector = vector.astype(jnp.uint8)
    size = vector.dtype.itemsize
    if size < 4:
        vector = jnp.pad(vector, (0, -vector.size % (4 // size))).reshape(-1, 4 // size)
    return jax.lax.bitcast_convert_type(vector, jnp.uint32).ravel()


def _from_words(words: jax.Array, dtype: Any, count: int) -> jax.Array:
    """The inverse of `_as_words`."""
    plain = jnp.dtype(jnp.uint8) if dtype == jnp.bool_ else dtype
    if plain.itemsize > 4:
        words = words.reshape(-1, plain.itemsize // 4)
    return jax.lax.bitcast_convert_type(words, plain).ravel()[:count].astype(dtype)
