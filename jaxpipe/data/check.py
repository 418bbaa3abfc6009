"""Checks batches, micro-batches, examples and per-layer params by types and shapes, before anything is traced or moved."""

import jax
from jax.sharding import Mesh

from jaxpipe.data.leaves import check_pair, check_rows, check_types, named, paths
from jaxpipe.errors import DataError, LayerError
from jaxpipe.mesh import data_size
from jaxpipe.model.kinds import take_off_boxes
from jaxpipe.model.shapes import aval, describe
from jaxpipe.types import Batch, Params, Tree


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


def check_micro_batch(item: Batch, ranks: int, needs_labels: bool = True, any_rows: bool = False) -> None:
    """Checks one micro-batch before it goes to a device.

    Args:
      item: (inputs, labels) with leaves [B, ...].
      ranks: the number of data ranks over which its rows are split.
      needs_labels: False leaves the labels unchecked.
      any_rows: True allows rows that are no multiple of the data ranks.

    Raises:
      DataError: the micro-batch does not fit; it names the leaf, what was expected and what was found.
    """
    leaves = named(item[0], item[1] if needs_labels else None)
    check_types(leaves, native=False)  # stacking makes arrays of the native byte order
    for name, leaf in leaves:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise DataError(
                f"{name} is {describe(leaf)} on devices of several processes. Yield what this process has of it, as a "
                "NumPy array: whole micro-batches, or with Config(local_rows=True) the rows of this process."
            )
    check_rows(leaves, 0, 1 if any_rows else ranks)


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


def check_layer_params(layers: object, num_layers: int) -> list[Params]:
    """Checks a list with the params of each layer, before the shapes of its arrays are read.

    Returns:
      The layers, without the boxes in which flax.linen may have put their arrays.

    Raises:
      LayerError: it is no list, has another length, or holds something that JAX cannot take.
    """
    if not isinstance(layers, (list, tuple)):
        raise LayerError(
            f"layers is a {type(layers).__name__}: expected a list with the params of each layer, as to_layers gives."
        )
    if len(layers) != num_layers:
        raise LayerError(f"{len(layers)} per-layer params were given; the module has {num_layers} layers.")
    plain = [take_off_boxes(layer)[0] for layer in layers]
    for index, layer in enumerate(plain):
        arrays = [(name, leaf) for name, leaf in paths(layer) if not isinstance(leaf, (bool, int, float, complex))]
        check_types([(f"layers[{index}]{name}", leaf) for name, leaf in arrays], LayerError)
    return plain
