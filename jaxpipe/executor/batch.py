"""Batches with leaves [M, B, ...]: checks, shapes of one micro-batch on one data rank, partition specs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.errors import DataError
from jaxpipe.mesh import DATA, data_size
from jaxpipe.model.shapes import aval, describe

P = PartitionSpec
Tree = Any


def check_batch(
    batch: Any, num_micro_batches: int | None, mesh: Mesh, needs_labels: bool = True, any_rows: bool = False
) -> tuple[Tree, Tree, int]:
    """Splits a batch into (inputs, labels, M).

    Args:
      num_micro_batches: what M must be, or None if any will do.
      any_rows: the rows need not be a multiple of the data ranks.

    Raises:
      DataError: naming the leaf, what was expected and what was found.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise DataError(
            f"A batch is a pair (inputs, labels), got a {kind}. Labels may be None where nothing needs them."
        )
    inputs, labels = batch
    if not jax.tree.leaves(inputs):
        raise DataError(f"The inputs of the batch hold no array: {inputs!r}.")
    found = num_micro_batches
    ranks = data_size(mesh)
    checked = {"inputs": inputs, "labels": labels} if needs_labels else {"inputs": inputs}
    for path, leaf in jax.tree_util.tree_flatten_with_path(checked)[0]:
        name = path[0].key + jax.tree_util.keystr(path[1:])
        shape = aval(leaf).shape
        if len(shape) < 2:
            raise DataError(
                f"{name} is {describe(leaf)}. Leaves of a batch are [M, B, ...]: micro-batches, then rows; "
                "add the dim that is missing."
            )
        if found is None:
            found = shape[0]
        if shape[0] != found or not found:
            raise DataError(
                f"{name} is {describe(leaf)}: its first dim is {shape[0]}, but there are {found} micro-batches. Leaves of "
                f"a batch are [M, B, ...] with M = {found}: reshape it, or change num_micro_batches."
            )
        if not shape[1]:
            raise DataError(f"{name} is {describe(leaf)}: its micro-batches have no rows. Leave empty ones out.")
        if shape[1] % ranks and not any_rows:
            raise DataError(
                f"{name} is {describe(leaf)}: its {shape[1]} rows per micro-batch cannot be split evenly over {ranks} data "
                f"ranks. Use a multiple of {ranks}."
            )
    assert found is not None
    return inputs, labels, found


def micro_batch_avals(tree: Tree, mesh: Mesh) -> Tree:
    """Abstract values of one micro-batch on one data rank, from leaves [M, B, ...]."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = aval(leaf)
        return jax.ShapeDtypeStruct((leaf.shape[1] // data_size(mesh), *leaf.shape[2:]), leaf.dtype)

    return jax.tree.map(one, tree)


def batch_specs(tree: Tree, mesh: Mesh) -> Tree:
    """Rows over the data ranks; every pipeline rank has all micro-batches."""
    return jax.tree.map(lambda _: P(None, DATA) if DATA in mesh.axis_names else P(), tree)


def pick(tree: Tree, micro_batch: jax.Array) -> Tree:
    """One micro-batch of leaves [M, ...]."""
    at = micro_batch.astype(jnp.uint32)  # unsigned: no code for negative indices, which would have M in it
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), tree)
