"""Micro-batches of unlike size, exactly: cut into pieces of one shape each, and their sums joined.

Nothing is padded with rows that count. Micro-batches of r rows on D data ranks are one program run with the rows that
divide evenly, r - r % D, and one with the r % D rows left: one row on each data rank, where the ranks without a real row
repeat one and do not count.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import DataError
from jaxpipe.executor.options import Found, Options
from jaxpipe.executor.tally import loss_of
from jaxpipe.mesh import DATA
from jaxpipe.model.shapes import describe
from jaxpipe.processes.group import settled
from jaxpipe.types import AnyArray, Batch, Tree


@dataclass(frozen=True)
class Piece:
    """Part of the rows of some micro-batches.

    Attributes:
      inputs, labels: leaves [M of the piece, rows, ...], where the data ranks divide the rows.
      real: bool [D], which data ranks count, or None if all do.
      micro_batch, row: where the piece begins in the whole.
      rows: how many of its rows count.
    """

    inputs: Tree
    labels: Tree
    real: np.ndarray | None
    micro_batch: int
    row: int
    rows: int


def cut(groups: Sequence[Batch], data_ranks: int) -> list[Piece]:
    """The pieces of batches with leaves [M, B, ...]."""
    pieces: list[Piece] = []
    first = 0
    for inputs, labels in groups:
        count, rows = jax.tree.leaves(inputs)[0].shape[:2]
        uneven = len(groups) > 1 or rows % data_ranks != 0
        if uneven and any(leaf.shape[1] != rows for leaf in jax.tree.leaves((inputs, labels))):
            raise DataError(
                f"The leaves of a batch have unlike numbers of rows: {describe((inputs, labels))}. To be split unevenly "
                f"over {data_ranks} data ranks, all leaves [M, B, ...] must have the same B."
            )
        left = rows % data_ranks
        even = rows - left
        if not left:
            pieces.append(Piece(inputs, labels, None, first, 0, rows))
        else:
            if even:
                pieces.append(Piece(*_rows((inputs, labels), np.arange(even)), None, first, 0, even))
            repeated = even + np.minimum(np.arange(data_ranks), left - 1)
            pieces.append(Piece(*_rows((inputs, labels), repeated), np.arange(data_ranks) < left, first, even, left))
        first += count
    return pieces


def _rows(batch: Batch, rows: np.ndarray) -> Batch:
    def one(leaf: AnyArray) -> AnyArray:
        if isinstance(leaf, Tracer):
            raise DataError(
                f"Inside jit the rows of a micro-batch must be a multiple of the data ranks; {leaf.shape[1]} are not. Call "
                "evaluate outside of jit, or pad the batch and let loss_fn return jaxpipe.Weighted."
            )
        return leaf[:, rows] if isinstance(leaf, jax.Array) else np.asarray(leaf)[:, rows]

    return jax.tree.map(one, batch)


@dataclass(frozen=True)
class _Place:
    """Where a piece lies in the whole: micro-batches `first` to `first + count`, rows `row` to `row + rows`."""

    first: int
    count: int
    row: int
    rows: int


def join(pieces: Sequence[Piece], found: Sequence[Found], options: Options) -> Found:
    """The results of a whole from those of its pieces."""
    places = _places(pieces)
    loss, metrics = _join_sums([(f.loss, f.metrics) for f in found], places, options)
    outputs, rows = _join_kept([(f.outputs, f.rows) for f in found], places)
    return Found(loss, metrics, outputs, rows)


def join_on(last: Mesh, holds: bool, pieces: Sequence[Piece], found: Sequence[Found], options: Options) -> Found:
    """`join` with several processes, each of which computes only with arrays that it holds a part of.

    Args:
      last: the devices of the last rank, where the outputs are.
      holds: whether some of them are of this process.
    """
    places = _places(pieces)
    loss, metrics = None, None
    if found[0].metrics is not None:
        loss, metrics = _join_sums([(f.loss, f.metrics) for f in found], places, options)
    _, rows = _join_kept([(None, f.rows) for f in found], places)
    settled(rows)
    # Said here, not left to the compiler, because the others have to know without it where the outputs are.
    ranks = last.shape.get(DATA, 1)
    cut_rows = DATA in last.axis_names and _most(places) % ranks == 0
    where = NamedSharding(last, PartitionSpec(None, DATA) if cut_rows else PartitionSpec())
    fill = _fill_on(where, places)
    outputs = [f.outputs for f in found]
    if holds:
        return Found(loss, metrics, settled(fill(outputs)), rows)
    shapes = jax.eval_shape(fill, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), outputs))
    absent = jax.tree.map(lambda a: jax.make_array_from_single_device_arrays(a.shape, where, [], dtype=a.dtype), shapes)
    return Found(loss, metrics, absent, rows)


def _places(pieces: Sequence[Piece]) -> tuple[_Place, ...]:
    return tuple(_Place(p.micro_batch, jax.tree.leaves(p.inputs)[0].shape[0], p.row, p.rows) for p in pieces)


def flat(leaf: jax.Array) -> jax.Array:
    """[M, B, ...] -> [M * B, ...]."""
    return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


# The outputs, and the values per row by the name of their metric.
_Kept = tuple[Tree, dict[str, jax.Array]]


# Two programs, because sums and outputs may lie on different devices.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _join_sums(found: Sequence[Any], places: tuple[_Place, ...], options: Options) -> tuple[Any, Any]:
    loss, metrics = None, dict(found[0][1])
    for _, more in found[1:]:
        metrics = {name: metrics[name] + each for name, each in more.items()}
    if options.loss:
        sums = [jnp.zeros((_num_micro_batches(places),), a.dtype) for a in found[0][0]]
        for place, (terms, _) in zip(places, found, strict=True):
            here = slice(place.first, place.first + place.count)
            sums = [s.at[here].add(a) for s, a in zip(sums, terms, strict=True)]
        loss = (sums[0], sums[1]) if options.raw else loss_of((sums[0], sums[1]), options.reduce_output)
    return loss, metrics if options.raw else {name: joined.finish() for name, joined in metrics.items()}


@functools.partial(jax.jit, static_argnums=1)
def _join_kept(
    found: Sequence[tuple[Tree, dict[str, jax.Array]]], places: tuple[_Place, ...]
) -> tuple[Tree, dict[str, jax.Array]]:
    def in_order(*leaves: jax.Array) -> jax.Array:
        parts = [
            leaf[m - place.first, : place.rows]
            for m in range(_num_micro_batches(places))
            for place, leaf in zip(places, leaves, strict=True)
            if place.first <= m < place.first + place.count
        ]
        return jnp.concatenate(parts)

    outputs, rows = zip(*found, strict=True)
    return _filled(outputs, places), jax.tree.map(in_order, *rows)


@functools.lru_cache(maxsize=64)
def _fill_on(sharding: NamedSharding, places: tuple[_Place, ...]) -> Callable[[Sequence[Tree]], Tree]:
    """`_filled`, compiled; all results have the given sharding."""
    return jax.jit(lambda outputs: _filled(outputs, places), out_shardings=sharding)


def _filled(outputs: Sequence[Tree], places: tuple[_Place, ...]) -> Tree:
    """The outputs of all pieces in arrays [M, B, ...], with zeros where there is no row."""

    def one(*leaves: jax.Array) -> jax.Array:
        whole = jnp.zeros((_num_micro_batches(places), _most(places), *leaves[0].shape[2:]), leaves[0].dtype)
        for place, leaf in zip(places, leaves, strict=True):
            part = leaf[:, : place.rows]
            whole = whole.at[place.first : place.first + place.count, place.row : place.row + place.rows].set(part)
        return whole

    return jax.tree.map(one, *outputs)


def _most(places: Sequence[_Place]) -> int:
    """B of the whole: the rows of the largest micro-batch."""
    return max(place.row + place.rows for place in places)


def _num_micro_batches(places: Sequence[_Place]) -> int:
    return max(place.first + place.count for place in places)
