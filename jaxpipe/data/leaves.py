"""Judges the leaves of inputs and labels by their types and shapes alone. Nothing is computed or moved."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpipe.checks import show
from jaxpipe.errors import DataError, JaxpipeError
from jaxpipe.model.shapes import aval, describe
from jaxpipe.types import Batch, Tree

Named = list[tuple[str, Any]]  # leaves with their names

_AS_ARRAY = "Lists and tuples are structures of arrays here; if one stands for an array, make it one: np.asarray(...)."


def paths(tree: Tree) -> Named:
    """The leaves of a tree with their paths, such as `['mask'][0]`.

    Raises:
      DataError: a dict has keys that cannot be sorted.
    """
    try:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    except ValueError as error:
        raise DataError(f"The keys of a dict cannot be sorted, as JAX does: {error} Use strings throughout.") from error
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def named(inputs: Tree, labels: Tree = None) -> Named:
    """The leaves of inputs and labels with names such as `labels['mask']`.

    Raises:
      DataError: the inputs hold no array, or a dict has keys that cannot be sorted.
    """
    found = [("inputs" + path, leaf) for path, leaf in paths(inputs)]
    if not found:
        raise DataError(f"The inputs of the batch hold no array: {show(inputs)}.")
    return found + [("labels" + path, leaf) for path, leaf in paths(labels)]


def check_pair(item: object, what: str, rule: str = "") -> Batch:
    """Returns `item` as (inputs, labels).

    Args:
      what: the beginning of the message.
      rule: the message goes on with it.

    Raises:
      DataError: it is no pair.
    """
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    kind = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
    raise DataError(f"{what} a {kind}.{rule} Labels may be None where nothing needs them.")


def check_types(leaves: Named, kind: type[JaxpipeError] = DataError, native: bool = True) -> None:
    """Refuses leaves that JAX cannot take, or would take for something else than they are.

    Args:
      leaves: anything with names.
      kind: the class of the error.
      native: True requires the byte order of this machine, and allows shapes without numbers. False is for what an iterator
        yields: any byte order, and no mere shapes.

    Raises:
      JaxpipeError: of class `kind`; it names the leaf.
    """
    for name, leaf in leaves:
        if fault := _fault(leaf, native):
            raise kind(f"{name} is {fault}")


def check_rows(leaves: Named, dim: int, ranks: int, where: str = "") -> None:
    """Checks that all leaves have the same number of rows.

    Args:
      leaves: array-like, [M, B, ...] or [B, ...], with names.
      dim: the dim of the rows, 1 or 0.
      ranks: must divide the number of rows.
      where: messages say it before the name of a leaf.

    Raises:
      DataError: the numbers of rows differ, are 0, or are no multiple of `ranks`; it names the leaf.
    """
    first, rows = leaves[0][0], aval(leaves[0][1]).shape[dim : dim + 1]
    for name, leaf in leaves:
        shape = aval(leaf).shape
        if len(shape) <= dim:
            raise DataError(
                f"{where}{name} is {describe(leaf)}, which has no rows: the first dim of every leaf of a micro-batch is "
                "its rows, all of them the same number. Repeat what is the same for all rows, or keep it in a layer."
            )
        if not shape[dim]:
            raise DataError(f"{where}{name} is {describe(leaf)}: its micro-batches have no rows. Leave empty ones out.")
        if name == first and shape[dim] % ranks:
            raise DataError(
                f"{where}{name} is {describe(leaf)}: its {shape[dim]} rows per micro-batch cannot be split evenly over "
                f"{ranks} data ranks. Use a multiple of {ranks}."
            )
        if shape[dim] != rows[0]:
            raise DataError(
                f"{where}{name} is {describe(leaf)} and has {shape[dim]} rows, but {first} is {describe(leaves[0][1])} "
                f"and has {rows[0]}. The first dim of every leaf of inputs and labels is the rows of a micro-batch. "
                f"{_AS_ARRAY}"
            )


def appearance(item: Batch) -> Hashable | None:
    """A value that is equal for micro-batches about which all of these checks say the same; None if that is not certain.

    It saves time: the checks themselves take a good part of a millisecond, which adds up over the micro-batches of a step.
    """
    try:
        leaves, structure = jax.tree.flatten(item)
        hash(structure)
    except (ValueError, TypeError):  # keys that cannot be sorted, or a node of the user with data that cannot be hashed
        return None
    if not all(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in leaves):
        return None
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        return None
    return structure, tuple((type(leaf), leaf.shape, leaf.dtype) for leaf in leaves)


def difference(item: Batch, first: Batch, rows_too: bool) -> tuple[str, str] | None:
    """The first difference between two micro-batches in structure, shapes or dtypes.

    Args:
      rows_too: whether different numbers of rows, the first dim, are a difference.

    Returns:
      How it is in `item`, and how it is in `first`; None if there is no difference.
    """
    mine, theirs = dict(named(*item)), dict(named(*first))
    for name in {**mine, **theirs}:
        if name not in theirs:
            return f"{describe(mine[name])} at {name}", f"without {name}; it has {', '.join(theirs)}"
        if name not in mine:
            return f"without {name}; it has {', '.join(mine)}", f"{describe(theirs[name])} there"
    for name, leaf in mine.items():
        one, other = aval(leaf), aval(theirs[name])
        start = 0 if rows_too else 1
        if (one.shape[start:], len(one.shape), one.dtype) != (other.shape[start:], len(other.shape), other.dtype):
            return f"{describe(leaf)} at {name}", f"{describe(theirs[name])} there"
    if jax.tree.structure(item) != jax.tree.structure(first):
        return describe(item), describe(first)
    return None


def _fault(leaf: Any, native: bool) -> str | None:
    """What is wrong with a leaf, and what to do about it; None if nothing is wrong."""
    if isinstance(leaf, Tracer) or (native and isinstance(leaf, jax.ShapeDtypeStruct)):
        return None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "a jax.ShapeDtypeStruct, a shape without numbers. Only `example`, lower_train and lower_eval take those."
    if isinstance(leaf, np.matrix):
        return "a np.matrix, which always has two dims. Pass np.asarray(...) of it."
    if isinstance(leaf, jax.Array):
        return "an array that was deleted or donated. Pass a copy of it, jnp.copy(...)." if leaf.is_deleted() else None
    if isinstance(leaf, (bool, int, float, complex, str, bytes, bytearray)):
        return f"{show(leaf)}, a single {type(leaf).__name__}, not an array. {_AS_ARRAY}"
    if isinstance(leaf, np.ma.MaskedArray):
        return "a masked array, whose mask would be lost. Pass leaf.filled(...), and the mask as an array of its own."
    try:
        dtype = np.asarray(leaf).dtype
    except Exception as error:  # another library may raise anything
        return f"a {type(leaf).__name__}, which NumPy cannot make an array of ({type(error).__name__}: {error})."
    if dtype.kind == "O":
        return (
            f"{show(leaf)}, of which NumPy makes an array of Python objects: expected numbers. Rows of unlike length are "
            "padded to one length; other objects have no place in a batch."
        )
    if dtype.kind in "US":
        return f"an array of text ({dtype}): expected numbers, such as the ids that a tokenizer gives."
    known = jnp.issubdtype(dtype, np.number) or dtype == np.bool_
    if not known or dtype.name in ("longdouble", "clongdouble", "float96", "float128", "complex192", "complex256"):
        return f"an array of dtype {dtype}, which JAX does not have. Convert it: .astype(np.float32)."
    if native and not dtype.isnative:
        return f"an array of dtype {dtype}, in the byte order of other machines. Convert it: .astype({dtype.name!r})."
    return None
