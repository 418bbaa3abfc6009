"""Looks at batches, micro-batches and examples by types and shapes, before anything is traced or moved."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.data.leaves import check_pair, check_rows, check_types, named
from jaxpipe.errors import DataError
from jaxpipe.mesh import data_size
from jaxpipe.model.shapes import aval, describe
from jaxpipe.types import Batch, Tree


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
    inputs, labels = check_pair(batch, "A batch is a pair (inputs, labels), got")
    leaves = named(inputs, labels if needs_labels else None)
    check_types(leaves)
    found = num_micro_batches
    for name, leaf in leaves:
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
    check_rows(leaves, 1, 1 if any_rows else data_size(mesh))
    assert found is not None
    return inputs, labels, found


def check_micro_batch(item: Batch, mesh: Mesh, needs_labels: bool = True, any_rows: bool = False) -> None:
    """Looks at one micro-batch (inputs, labels), leaves [B, ...], before it goes to a device.

    Args:
      any_rows: the rows need not be a multiple of the data ranks.

    Raises:
      DataError: naming the leaf, what was expected and what was found.
    """
    leaves = named(item[0], item[1] if needs_labels else None)
    check_types(leaves, native=False)  # stacking them makes native ones
    # With several processes each brings a part, of which only the whole has to be divisible.
    check_rows(leaves, 0, 1 if any_rows or jax.process_count() > 1 else data_size(mesh))


def check_example(example: Any, mesh: Mesh) -> None:
    """The same for the example of a micro-batch: arrays or ShapeDtypeStruct."""
    inputs, labels = check_pair(
        example, "example is one micro-batch: a pair (inputs, labels) of arrays or jax.ShapeDtypeStruct; got"
    )
    leaves = named(inputs, labels)
    check_types(leaves)
    check_rows(leaves, 0, data_size(mesh), "The example: ")
