"""The buffers that keep what a forward saves until its backward reads it.

One buffer per distinct (shape, dtype), [K slots, entries, *shape]: K micro-batches in flight, and as many entries as the
stage program with the most values of that shape needs. Values keep their natural shapes (packing them into one flat
vector would cost a relayout on tiled memories), and are written and read where they are made and used, inside the scan
over layers, so that nothing is stacked first and copied afterwards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxpipe.executor.residence import Repeat
from jaxpipe.model.values import raw, raw_aval, typed

Buffers = dict[str, jax.Array]


@dataclass(frozen=True)
class Entry:
    """Place of one saved value: repetition i of its segment writes entry `start + i * stride` of buffer `buffer`."""

    buffer: str
    start: int
    stride: int


class Store:
    """Plans the buffers. Each stage program takes its entries from a cursor of its own."""

    def __init__(self):
        self._avals: dict[str, jax.ShapeDtypeStruct] = {}
        self._capacity: Counter[str] = Counter()

    def cursor(self) -> "Cursor":
        """A fresh allocation for one stage program; programs of different ranks share the buffers."""
        return Cursor(self)

    def reserve(self, name: str, aval: jax.ShapeDtypeStruct, entries: int) -> None:
        """Makes the buffer `name`, of values of this shape, have at least so many entries per slot."""
        self._avals[name] = aval
        self._capacity[name] = max(self._capacity[name], entries)

    def avals(self, num_slots: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Abstract values of the buffers."""
        return {
            name: jax.ShapeDtypeStruct((num_slots, self._capacity[name], *aval.shape), aval.dtype)
            for name, aval in self._avals.items()
        }

    def allocate(self, num_slots: int, poison: bool) -> Buffers:
        """The buffers, filled with zeros, or with NaN if `poison`."""
        return {name: blank(aval.shape, aval.dtype, poison) for name, aval in self.avals(num_slots).items()}


class Cursor:
    """Gives out the entries of one stage program, one after the other."""

    def __init__(self, store: Store):
        self._store = store
        self._used: Counter[str] = Counter()

    def take(self, avals: Sequence[jax.ShapeDtypeStruct], repeats: int) -> list[Entry]:
        """Entries for values of these shapes, each made `repeats` times."""
        avals = [raw_aval(aval) for aval in avals]  # a PRNG key is kept as its words
        named = [(_name(aval), aval) for aval in avals]
        per_repeat = Counter(name for name, _ in named)
        seen: Counter[str] = Counter()
        entries: list[Entry] = []
        for name, _ in named:
            entries.append(Entry(name, self._used[name] + seen[name], per_repeat[name]))
            seen[name] += 1
        for name, aval in named:
            self._store.reserve(name, aval, self._used[name] + per_repeat[name] * repeats)
        for name, count in per_repeat.items():
            self._used[name] += count * repeats
        return entries


def write(
    buffers: Buffers, slot: jax.Array, entries: Sequence[Entry], repeat: Repeat, values: Sequence[jax.Array]
) -> Buffers:
    """Stores the values of one repetition."""
    buffers = dict(buffers)
    for entry, value in zip(entries, values, strict=True):
        at = entry.start + repeat * entry.stride
        buffers[entry.buffer] = buffers[entry.buffer].at[slot, at].set(raw(value))
    return buffers


def read(
    buffers: Buffers,
    slot: jax.Array,
    entries: Sequence[Entry],
    repeat: Repeat,
    avals: Sequence[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """The values that `write` stored."""
    return [
        typed(buffers[entry.buffer][slot, entry.start + repeat * entry.stride], aval)
        for entry, aval in zip(entries, avals, strict=True)
    ]


def blank(shape: tuple[int, ...], dtype: DTypeLike, poison: bool) -> jax.Array:
    """A buffer that nothing was written to: zeros, or (if `poison`) values that no result survives."""
    if poison and jnp.issubdtype(dtype, jnp.inexact):
        return jnp.full(shape, jnp.nan, dtype)
    return jnp.zeros(shape, dtype)


def _name(aval: jax.ShapeDtypeStruct) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
