"""`pad_micro_batches`: micro-batches of unlike rows and lengths made alike, with weights that keep the loss exact."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.checks import count, show
from jaxpipe.data.leaves import check_pair, check_rows, check_types, named
from jaxpipe.errors import ConfigError, DataError
from jaxpipe.model.shapes import describe, is_key
from jaxpipe.types import Batch


def pad_micro_batches(
    micro_batches: Iterable[Batch],
    *,
    num_micro_batches: int | None = None,
    rows: int | None = None,
    length: int | None = None,
    multiple_of: int = 1,
    fill: float = 0,
) -> list[Batch]:
    """Makes the micro-batches of one step alike, so that `train_batch` and the others take them.

    Every leaf gets the rows of the largest micro-batch. Every leaf with two dims or more also gets the length of the
    longest one of its name along dim 1. Rows that are not there repeat a real row, positions that are not there hold
    `fill` (False in arrays of bools). A weight of 1 or 0 says what is real, and goes to `loss_fn` beside the labels:

        def loss_fn(logits, labels_and_weights):
            labels, weights = labels_and_weights
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jaxpipe.Weighted((each * weights).sum(), weights.sum())

        batch = jaxpipe.pad_micro_batches(itertools.islice(data, M), num_micro_batches=M, multiple_of=64)
        loss = engine.train_batch(iter(batch))

    The loss and its gradient are then those of the real rows and positions, if the model itself lets no padding into what
    is real: a causal model does not, one that attends to all positions needs a mask in its inputs. Layers that mix rows
    (batch statistics, the balance loss of experts) see the padding.

    Args:
      micro_batches: pairs (inputs, labels), leaves [B, ...] or [B, L, ...].
      num_micro_batches: M; where there are fewer micro-batches, others without weight are added. None: as many as there
        are.
      rows: B of the result; None: the most there are. On several data ranks, a multiple of these.
      length: dim 1 of every leaf with two dims or more; None: the longest there is.
      multiple_of: lengths are rounded up to a multiple of this, so that a few shapes serve all steps; each compiles once.
      fill: for positions that are not there, in inputs and in labels. It must be something that the model can take.

    Returns:
      M pairs (inputs, (labels, weights)) of NumPy arrays. The weights are float32: [B, L] if the first leaf of the labels
      has two dims or more, else [B].

    Raises:
      DataError: there is no micro-batch, one has no labels, or they differ in more than rows and length, or do not fit the
        sizes that are given. ConfigError: such a size is no integer of at least 1, or an
        array cannot hold `fill`.
    """
    if not isinstance(micro_batches, Iterable):
        raise DataError(
            f"micro_batches={show(micro_batches)} is no iterable. Pass the micro-batches of a step, pairs (inputs, "
            "labels), such as itertools.islice(data, M)."
        )
    items = [_checked(item, number) for number, item in enumerate(micro_batches)]
    if not items:
        raise DataError("pad_micro_batches got no micro-batch. There is nothing to pad; end the epoch.")
    wanted = len(items) if num_micro_batches is None else count("num_micro_batches", num_micro_batches)
    if wanted < len(items):
        raise DataError(f"pad_micro_batches got {len(items)} micro-batches, more than num_micro_batches={wanted}.")
    every, structures = zip(*(jax.tree.flatten(item) for item in items), strict=True)
    for number, (leaves, structure) in enumerate(zip(every, structures, strict=True)):
        if structure != structures[0] or any(map(_differ, leaves, every[0])):
            hosts = _dtypes(leaves, every[0])
            raise DataError(
                f"Micro-batch {number} is {describe(items[number])}, but micro-batch 0 is {describe(items[0])}{hosts}. "
                "They may differ in their rows (dim 0) and lengths (dim 1), and in nothing else."
            )
    most = max(leaves[0].shape[0] for leaves in every)
    all_rows = most if rows is None else _at_least("rows", count("rows", rows), most)
    step = count("multiple_of", multiple_of)
    lengths: list[int | None] = []
    for same in zip(*every, strict=True):
        longest = max(leaf.shape[1] for leaf in same) if same[0].ndim > 1 else None
        if longest is not None:
            asked = longest if length is None else _at_least("length", count("length", length), longest)
            longest = -(-asked // step) * step
        lengths.append(longest)

    made: list[Batch] = []
    for leaves, structure in zip(every, structures, strict=True):
        padded = [_padded(leaf, all_rows, long, fill) for leaf, long in zip(leaves, lengths, strict=True)]
        inputs, labels = jax.tree.unflatten(structure, padded)
        first = len(jax.tree.leaves(inputs))
        weights = np.zeros(padded[first].shape[:2], np.float32)
        real = leaves[first].shape[:2]
        weights[tuple(slice(size) for size in real)] = 1
        made.append((inputs, (labels, weights)))
    for _ in range(wanted - len(made)):
        inputs, (labels, weights) = made[-1]
        made.append((inputs, (labels, np.zeros_like(weights))))
    return made


def _checked(item: Any, number: int) -> Batch:
    inputs, labels = check_pair(item, f"Micro-batch {number} is", " It is a pair (inputs, labels).")
    leaves = named(inputs, labels)
    check_types(leaves, native=False)
    check_rows(leaves, 0, 1, f"Micro-batch {number}: ")
    if not jax.tree.leaves(labels):
        raise DataError(
            f"Micro-batch {number} has no labels. Weights say which labels are real, so there must be some."
        )
    if any(is_key(leaf) for leaf in jax.tree.leaves((inputs, labels)) if isinstance(leaf, jax.Array)):
        raise DataError(
            f"Micro-batch {number} is {describe((inputs, labels))}, with PRNG keys, which are no arrays of NumPy. Pass "
            "jax.random.key_data(keys), and make keys of it in a layer (jax.random.wrap_key_data)."
        )
    return jax.tree.map(np.asarray, (inputs, labels))


def _dtypes(leaves: Sequence[np.ndarray], first: Sequence[np.ndarray]) -> str:
    """The first two dtypes that differ, as NumPy has them: on the device int64 is int32, as a rule."""
    for one, other in zip(leaves, first, strict=False):
        if one.dtype != other.dtype:
            return f" (on the host one array is {one.dtype}, and was {other.dtype} there)"
    return ""


def _differ(leaf: np.ndarray, first: np.ndarray) -> bool:
    """Whether two leaves differ in more than the sizes of their first two dims."""
    return leaf.ndim != first.ndim or leaf.shape[2:] != first.shape[2:] or leaf.dtype != first.dtype


def _at_least(name: str, size: int, there: int) -> int:
    if size < there:
        raise DataError(f"{name}={size} is less than the {there} that a micro-batch has. Nothing is cut off here.")
    return size


def _padded(leaf: np.ndarray, rows: int, length: int | None, fill: float) -> np.ndarray:
    # A copy of a real row, and not zeros: layers may divide by something of a row, and NaN times a weight of 0 is NaN.
    more = np.repeat(leaf[-1:], rows - leaf.shape[0], axis=0)
    leaf = np.concatenate([leaf, more]) if len(more) else leaf
    if length is None or length == leaf.shape[1]:
        return leaf
    ends = [(0, 0)] * leaf.ndim
    ends[1] = (0, length - leaf.shape[1])
    return np.pad(leaf, ends, constant_values=_as(fill, leaf.dtype))


def _as(fill: Any, dtype: np.dtype) -> np.ndarray:
    """The filling as a number of this dtype; raises ConfigError if it is none."""
    if dtype.kind == "b":
        return np.asarray(False)  # a mask beside ids of which one stands for padding: that is not there
    if jnp.issubdtype(dtype, jnp.inexact):
        with contextlib.suppress(Exception):
            return np.asarray(fill, dtype).reshape(())
    with contextlib.suppress(Exception):
        cast = np.asarray(fill, dtype).reshape(())
        if cast == fill:
            return cast
    raise ConfigError(
        f"fill={show(fill)} is no number that an array of {dtype} can hold, and such an array is filled up."
    )
