"""From micro-batches on the host to batches on the mesh, leaves [M, B, ...]."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.data.pull import check_for_training, pull
from jaxpipe.mesh import DATA, data_size
from jaxpipe.model.shapes import aval, signature
from jaxpipe.types import Batch


def pull_batch(data_iter: Iterator[Batch], num_micro_batches: int, mesh: Mesh) -> Batch:
    """M micro-batches of one shape as a batch on the mesh, looked at before they go there.

    Raises:
      DataError: as `pull` and `check_micro_batch` do, or two micro-batches are unlike.
    """
    return stack(pull(data_iter, num_micro_batches, check_for_training(mesh)), mesh)


def group(items: Sequence[Batch]) -> list[list[Batch]]:
    """Neighbours of one shape together."""
    groups: list[list[Batch]] = []
    for item in items:
        if groups and signature(groups[-1][0]) == signature(item):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def put(items: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """Micro-batches of any numbers of rows -> batches with leaves [M, B, ...], one per group of neighbours of one shape.

    They are on the mesh if the data ranks divide their rows; else on the host, to be cut further.
    """
    batches = []
    for alike in group(items):
        if aval(jax.tree.leaves(alike[0])[0]).shape[0] % data_size(mesh) == 0:
            batches.append(stack(alike, mesh))
        else:
            batches.append(jax.tree.map(lambda *leaves: np.stack(leaves), *alike))
    return batches


def stack(items: Sequence[Batch], mesh: Mesh) -> Batch:
    """Stacks micro-batches and puts them on the mesh, rows over the data ranks (each process brings its own part)."""
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA) if DATA in mesh.axis_names else PartitionSpec())

    def one(*leaves: Any) -> jax.Array:
        if isinstance(leaves[0], jax.Array) and jax.process_count() == 1:
            if any(isinstance(leaf, jax.Array) and leaf.sharding != leaves[0].sharding for leaf in leaves):
                leaves = tuple(jax.device_put(leaf, leaves[0].sharding) for leaf in leaves)  # from where it is
            return jax.device_put(jnp.stack(leaves), sharding)  # np.stack would wait for the device
        stacked = np.stack(leaves)
        if jax.process_count() > 1:
            return jax.make_array_from_process_local_data(sharding, stacked)
        return jax.device_put(stacked, sharding)

    return jax.tree.map(one, *items)
