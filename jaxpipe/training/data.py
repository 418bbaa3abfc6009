"""From an iterator of micro-batches to one batch on the mesh, with leaves [M, B, ...]."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import DataError
from jaxpipe.mesh import DATA
from jaxpipe.model.shapes import describe, signature

Tree = Any
Batch = tuple[Tree, Tree]


def pull(data_iter: Iterator[Batch], num_micro_batches: int) -> list[Batch]:
    """Takes M micro-batches from an iterator.

    Raises:
      DataError: it is no iterator, ends early, or yields something else than pairs of one shape.
    """
    if not hasattr(data_iter, "__next__"):
        raise DataError(
            f"data_iter is a {type(data_iter).__name__}, not an iterator: each call would start it over. "
            "Make one with iter(...) and pass the same one to every call."
        )
    items: list[Batch] = []
    for item in data_iter:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            kind = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
            raise DataError(
                f"Micro-batch {len(items)} of data_iter is a {kind}. It yields pairs (inputs, labels); labels may be None "
                "where nothing needs them."
            )
        items.append((item[0], item[1]))
        if len(items) == num_micro_batches:
            break
    else:
        raise DataError(
            f"data_iter ended after {len(items)} of {num_micro_batches} micro-batches. Nothing was computed and the state "
            "is unchanged. Give it more data, let it repeat (itertools.cycle), or lower num_micro_batches."
        )
    first = signature(items[0])
    for index, item in enumerate(items):
        if signature(item) != first:
            raise DataError(
                f"Micro-batch {index} of data_iter is {describe(item)}, but micro-batch 0 is {describe(items[0])}. All "
                "micro-batches of one call have one shape: pad the odd one, or drop it."
            )
    return items


def stack(items: list[Batch], mesh: Mesh) -> Batch:
    """Stacks micro-batches and puts them on the mesh, rows over the data ranks (each process brings its own part)."""
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA) if DATA in mesh.axis_names else PartitionSpec())

    def one(*leaves: Any) -> jax.Array:
        if isinstance(leaves[0], jax.Array) and jax.process_count() == 1:
            return jax.device_put(jnp.stack(leaves), sharding)  # np.stack would wait for the device
        stacked = np.stack(leaves)
        if jax.process_count() > 1:
            return jax.make_array_from_process_local_data(sharding, stacked)
        return jax.device_put(stacked, sharding)

    return jax.tree.map(one, *items)
