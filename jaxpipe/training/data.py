"""From an iterator of micro-batches to one batch on the mesh, with leaves [M, B, ...]."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import DataError
from jaxpipe.mesh import DATA, data_size
from jaxpipe.model.shapes import aval, describe, signature

Tree = Any
Batch = tuple[Tree, Tree]


def pull(data_iter: Iterator[Batch], num_micro_batches: int) -> list[Batch]:
    """Takes M micro-batches from an iterator.

    Raises:
      DataError: it is no iterator, ends early, or yields something else than pairs.
    """
    items = take(data_iter, num_micro_batches)
    if len(items) < num_micro_batches:
        raise DataError(
            f"data_iter ended after {len(items)} of {num_micro_batches} micro-batches. Nothing was computed and the state "
            "is unchanged. Give it more data, let it repeat (itertools.cycle), or lower num_micro_batches."
        )
    return items


def pull_batch(data_iter: Iterator[Batch], num_micro_batches: int, mesh: Mesh) -> Batch:
    """M micro-batches of one shape as a batch on the mesh; raises DataError as `pull` and `check_alike` do."""
    items = pull(data_iter, num_micro_batches)
    check_alike(items)
    return stack(items, mesh)


def take(data_iter: Iterator[Batch], most: int) -> list[Batch]:
    """Takes up to `most` micro-batches from an iterator; fewer only where it ends."""
    if not hasattr(data_iter, "__next__"):
        raise DataError(
            f"data_iter is a {type(data_iter).__name__}, not an iterator: each call would start it over. "
            "Make one with iter(...) and pass the same one to every call."
        )
    items: list[Batch] = []
    for item in itertools.islice(data_iter, most):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            kind = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
            raise DataError(
                f"Micro-batch {len(items)} of data_iter is a {kind}. It yields pairs (inputs, labels); labels may be None "
                "where nothing needs them."
            )
        items.append((item[0], item[1]))
    return items


def check_alike(items: Sequence[Batch]) -> None:
    """Raises DataError unless all micro-batches have one shape."""
    first = signature(items[0])
    for index, item in enumerate(items):
        if signature(item) != first:
            raise DataError(
                f"Micro-batch {index} of data_iter is {describe(item)}, but micro-batch 0 is {describe(items[0])}. All "
                "micro-batches of one training step have one shape: pad the odd one, or drop it."
            )


def group(items: Sequence[Batch]) -> list[list[Batch]]:
    """Neighbours of one shape together; their shapes may differ in the rows only.

    Raises:
      DataError: they differ in something else.
    """
    groups: list[list[Batch]] = []
    for index, item in enumerate(items):
        if groups and signature(groups[-1][0]) == signature(item):
            groups[-1].append(item)
            continue
        if groups and _row_signature(item) != _row_signature(items[0]):
            raise DataError(
                f"Micro-batch {index} of data_iter is {describe(item)}, but micro-batch 0 is {describe(items[0])}. In one "
                "evaluation micro-batches may differ in the number of rows, their first dim, and in nothing else."
            )
        groups.append([item])
    return groups


def _row_signature(item: Batch) -> Any:
    return signature(jax.tree.map(lambda a: jax.ShapeDtypeStruct(aval(a).shape[1:], aval(a).dtype), item))


def put(items: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """Micro-batches of any numbers of rows -> batches with leaves [M, B, ...], one per group of neighbours of one shape.

    They are on the mesh if the data ranks divide their rows; else on the host, to be cut further.
    """
    batches = []
    for alike in group(items):
        rows = {aval(leaf).shape[0] if aval(leaf).shape else 0 for leaf in jax.tree.leaves(alike[0])}
        if all(count and count % data_size(mesh) == 0 for count in rows):
            batches.append(stack(alike, mesh))
        else:
            batches.append(jax.tree.map(lambda *leaves: np.stack(leaves), *alike))
    return batches


def stack(items: Sequence[Batch], mesh: Mesh) -> Batch:
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
