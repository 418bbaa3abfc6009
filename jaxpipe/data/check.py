"""Checks batches, micro-batches and examples by types and shapes, before anything is traced or moved."""

from jax.sharding import Mesh

from jaxpipe.data.leaves import check_pair, check_rows, check_types, named
from jaxpipe.errors import DataError
from jaxpipe.mesh import data_size
from jaxpipe.model.shapes import aval, describe
from jaxpipe.types import Batch, Tree


def check_batch(
    batch: object, num_micro_batches: int | None, mesh: Mesh, needs_labels: bool = True, any_rows: bool = False
) -> tuple[Tree, Tree, int]:
    """Checks a batch and splits it.

    Args:
      batch: a pair (inputs, labels) with leaves [M, B, ...].
      num_micro_batches: what M must be; None allows any M.
      needs_labels: False leaves the labels unchecked.
      any_rows: True allows rows that are no multiple of the data ranks.

    Returns:
      (inputs, labels, M).

    Raises:
      DataError: the batch does not fit; it names the leaf, what was expected and what was found.
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
    """Checks one micro-batch before it goes to a device.

    Args:
      item: (inputs, labels) with leaves [B, ...].
      needs_labels: False leaves the labels unchecked.
      any_rows: True allows rows that are no multiple of the data ranks.

    Raises:
      DataError: the micro-batch does not fit; it names the leaf, what was expected and what was found.
    """
    leaves = named(item[0], item[1] if needs_labels else None)
    check_types(leaves, native=False)  # stacking makes arrays of the native byte order
    # With several processes each one brings a part of the rows, and the data ranks must divide the whole only.
    check_rows(leaves, 0, 1 if any_rows else data_size(mesh))


def check_example(example: object, mesh: Mesh) -> None:
    """Checks the example of a micro-batch, a pair (inputs, labels) of arrays or ShapeDtypeStruct [B, ...].

    Raises:
      DataError: the example does not fit; it names the leaf, what was expected and what was found.
    """
    inputs, labels = check_pair(
        example, "example is one micro-batch: a pair (inputs, labels) of arrays or jax.ShapeDtypeStruct; got"
    )
    leaves = named(inputs, labels)
    check_types(leaves)
    check_rows(leaves, 0, data_size(mesh), "The example: ")
