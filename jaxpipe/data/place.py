"""Makes batches on the mesh, leaves [M, B, ...], of micro-batches on the host, leaves [B, ...]."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.data.share import Share
from jaxpipe.mesh import DATA
from jaxpipe.model.shapes import aval, avals, is_key, signature
from jaxpipe.model.values import typed
from jaxpipe.types import AnyArray, Avals, Batch, Tree


def group(items: Sequence[Batch]) -> list[list[Batch]]:
    """Groups neighbouring micro-batches of one shape."""
    groups: list[list[Batch]] = []
    for item in items:
        if groups and signature(groups[-1][0]) == signature(item):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def put(items: Sequence[Batch], share: Share) -> list[Batch]:
    """Makes one batch of each group of neighbouring micro-batches of one shape.

    Args:
      items: (inputs, labels) with leaves [B, ...]; the numbers of rows may differ.
      share: which of the rows this process brings.

    Returns:
      (inputs, labels) with leaves [M, B, ...] for each group. They are on the mesh if the data ranks divide their rows,
      and otherwise on the host, where they will be cut further.
    """
    batches = []
    for alike in group(items):
        if aval(jax.tree.leaves(alike[0])[0]).shape[0] % share.ranks == 0:
            batches.append(stack(alike, share))
        else:
            batches.append(jax.tree.map(_stacked, *alike))
    return batches


def stack(items: Sequence[Batch], share: Share) -> Batch:
    """Stacks micro-batches, leaves [B, ...], to a batch on the mesh, leaves [M, B, ...], with the rows over the data ranks.

    With several processes each one puts the rows onto its devices that belong there.
    """
    sharding = _sharding(share.mesh)

    def one(*leaves: AnyArray) -> jax.Array:
        if share.group.several:
            return _spread(_stacked(*leaves), share, sharding)
        if isinstance(leaves[0], jax.Array):
            if any(isinstance(leaf, jax.Array) and leaf.sharding != leaves[0].sharding for leaf in leaves):
                leaves = tuple(jax.device_put(leaf, leaves[0].sharding) for leaf in leaves)
            return jax.device_put(jnp.stack(leaves), sharding)  # np.stack would wait for the device
        return jax.device_put(_stacked(*leaves), sharding)

    return jax.tree.map(one, *items)


def _spread(stacked: AnyArray, share: Share, sharding: NamedSharding) -> jax.Array:
    """Puts what this process brings, [M, B, ...], onto its devices; the others do the same with theirs."""
    like = aval(stacked)
    if is_key(like):  # JAX takes keys only in a program to devices of other processes
        words = _spread(np.asarray(jax.random.key_data(stacked)), share, sharding)
        return jax.jit(lambda words: typed(words, like), out_shardings=sharding)(words)
    whole = (like.shape[0], share.whole(like.shape[1]), *like.shape[2:])
    before = share.first(like.shape[1])

    def part(index: Any) -> np.ndarray:  # a slice per dim
        start, stop, _ = index[1].indices(whole[1])
        return np.asarray(stacked[index[0], start - before : stop - before], like.dtype)

    return jax.make_array_from_callback(whole, sharding, part)


def on_all(tree: Tree, mesh: Mesh) -> Tree:
    """Leaves [M, B, ...], which every process holds whole, as a compiled step of several processes takes them.

    With one process, and inside of `jit`, they stay what they are. So does what is on devices of several processes already.
    """
    share = Share(mesh)
    if not share.group.several:
        return tree

    def one(leaf: AnyArray) -> AnyArray:
        if isinstance(leaf, Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return leaf
        # A copy, because on a CPU the result may be the memory of NumPy, which the caller may write into.
        return _spread(leaf if isinstance(leaf, jax.Array) else np.array(leaf), share, _sharding(mesh))

    return jax.tree.map(one, tree)


def batch_avals(tree: Tree, mesh: Mesh) -> Avals:
    """Abstract values of leaves [M, B, ...], which say that they lie as `stack` puts them."""
    sharding = _sharding(mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), avals(tree))


def _sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data ranks."""
    return NamedSharding(mesh, PartitionSpec(None, DATA) if DATA in mesh.axis_names else PartitionSpec())


def _stacked(*leaves: AnyArray) -> AnyArray:
    """The leaves stacked on the host; PRNG keys, which NumPy does not know, on the device."""
    if isinstance(leaves[0], jax.Array) and is_key(leaves[0]):
        return jnp.stack(leaves)
    return np.stack(leaves)
