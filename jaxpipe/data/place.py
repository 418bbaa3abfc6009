"""Makes batches on the mesh, leaves [M, B, ...], of micro-batches on the host, leaves [B, ...]."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.data.pull import check_for_training, pull
from jaxpipe.mesh import DATA, data_size
from jaxpipe.model.shapes import aval, is_key, signature
from jaxpipe.types import AnyArray, Batch


def pull_batch(data_iter: Iterator[Batch], num_micro_batches: int, mesh: Mesh) -> Batch:
    """Takes M micro-batches of one shape from an iterator, checks them, and puts them on the mesh.

    Returns:
      (inputs, labels) with leaves [M, B, ...], rows over the data ranks.

    Raises:
      DataError: as `pull` and `check_micro_batch` raise it, or two micro-batches differ in their shapes.
    """
    return stack(pull(data_iter, num_micro_batches, check_for_training(mesh)), mesh)


def group(items: Sequence[Batch]) -> list[list[Batch]]:
    """Groups neighbouring micro-batches of one shape."""
    groups: list[list[Batch]] = []
    for item in items:
        if groups and signature(groups[-1][0]) == signature(item):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def put(items: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """Makes one batch of each group of neighbouring micro-batches of one shape.

    Args:
      items: (inputs, labels) with leaves [B, ...]; the numbers of rows may differ.

    Returns:
      (inputs, labels) with leaves [M, B, ...] for each group. They are on the mesh if the data ranks divide their rows,
      and otherwise on the host, where they will be cut further.
    """
    batches = []
    for alike in group(items):
        if aval(jax.tree.leaves(alike[0])[0]).shape[0] % data_size(mesh) == 0:
            batches.append(stack(alike, mesh))
        else:
            batches.append(jax.tree.map(_stacked, *alike))
    return batches


def stack(items: Sequence[Batch], mesh: Mesh) -> Batch:
    """Stacks micro-batches, leaves [B, ...], to a batch on the mesh, leaves [M, B, ...], with the rows over the data ranks.

    With several processes each one brings the whole micro-batches, and puts the rows onto its devices that belong there.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA) if DATA in mesh.axis_names else PartitionSpec())

    def one(*leaves: AnyArray) -> jax.Array:
        if isinstance(leaves[0], jax.Array) and jax.process_count() == 1:
            if any(isinstance(leaf, jax.Array) and leaf.sharding != leaves[0].sharding for leaf in leaves):
                leaves = tuple(jax.device_put(leaf, leaves[0].sharding) for leaf in leaves)
            return jax.device_put(jnp.stack(leaves), sharding)  # np.stack would wait for the device
        stacked = _stacked(*leaves)
        if jax.process_count() > 1:
            return jax.make_array_from_callback(stacked.shape, sharding, lambda index: stacked[index])
        return jax.device_put(stacked, sharding)

    return jax.tree.map(one, *items)


def _stacked(*leaves: AnyArray) -> AnyArray:
    """The leaves stacked on the host; PRNG keys, which NumPy does not know, on the device."""
    if isinstance(leaves[0], jax.Array) and is_key(leaves[0]):
        return jnp.stack(leaves)
    return np.stack(leaves)
