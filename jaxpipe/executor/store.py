"""The buffers that keep what a forward saves until its backward reads it.

A rank has as many slots as it has micro-batches in flight, and in each what its stage program keeps of one. All ranks run
one program, so its buffers are as large on every rank as on the one that needs most. Values of one shape and dtype have a
buffer [rows, *shape], of as many rows as any stage program needs with its own number of slots. They keep their shape
(to pack them would cost a relayout on tiled memories), and are written and read where they are made and used, inside of
the scan over layers, so that nothing is stacked first and copied afterwards. But where stages keep unlike things, a buffer
for each shape would make every rank pay for all of them: what has no partner in other stages then lies end to end in one
vector per dtype. `rooms.with_rooms` says which values do.

On TPU an array may be laid out in any order of its dims, and a buffer has one order only wherever it is not to be copied.
What a backward runs again wants its input in the same order as the forward did, and XLA finds that by itself. But what a
forward has computed, its derivative may well want in another one. Then XLA copies the whole buffer in every tick, unless
such values are written and read in the order of their dims: it is then one of them that is laid out anew.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.rooms import with_rooms
from jaxpipe.model.values import raw, raw_aval, typed

Buffers = dict[str, jax.Array]


@dataclass(frozen=True)
class Entry:
    """Place of one saved value: among those of its shape that its stage program keeps of a micro-batch, repetition i of its
    segment writes number `start + i * stride`.

    With `in_order` it is written and read in the order of its dims.
    """

    program: "Kept" = field(repr=False, compare=False)
    kind: str
    start: int
    stride: int
    in_order: bool = False

    @property
    def buffer(self) -> str:
        """The name of the buffer that it lies in."""
        return self.program.store.buffer_of(self.kind)


class Store:
    """Plans the buffers. Each stage program takes its entries; then `settle` places them."""

    def __init__(self):
        self.kinds: dict[str, jax.ShapeDtypeStruct] = {}  # shape and dtype of values, by name
        self.apart: set[str] = set()  # those that have a buffer of their own
        self.programs: list[Kept] = []
        self._rows: dict[str, int] = {}  # of the buffers of values of one shape
        self._lengths: dict[str, int] = {}  # of the vectors

    def program(self) -> "Kept":
        """What one more stage program keeps; programs of different ranks share the buffers."""
        self.programs.append(Kept(self))
        return self.programs[-1]

    def settle(self, slots: Sequence[int], together: Sequence[Collection[int]] = ()) -> None:
        """Places everything, once all stage programs have taken their entries.

        Args:
          slots: per stage program, the most micro-batches that any rank that runs it has in flight, of all its stages.
          together: the numbers of programs that one rank runs, for ranks that run several. They number their slots
            together, so that each slot has room for what any of them keeps.
        """
        groups = _joined(len(self.programs), together)
        for group in groups:
            for number in group:
                self.programs[number].strides = {
                    kind: max(self.programs[other].used[kind] for other in group) for kind in self.kinds
                }
        by_dtype: dict[str, list[str]] = {}
        rows = {
            kind: [count * kept.strides[kind] for kept, count in zip(self.programs, slots, strict=True)]
            for kind in self.kinds
        }
        # What has a buffer of its own has no part in the choice of the others.
        self._rows, self._lengths = {kind: max(rows[kind]) for kind in self.kinds if kind in self.apart}, {}
        for kind, aval in self.kinds.items():
            if kind not in self.apart:
                by_dtype.setdefault(str(aval.dtype), []).append(kind)
        for kinds in by_dtype.values():
            sizes = [{n: r * _size(self.kinds[kind]) for n, r in enumerate(rows[kind])} for kind in kinds]
            for kind, alone in zip(kinds, with_rooms(sizes), strict=True):
                if alone:
                    self._rows[kind] = max(rows[kind])
        for kept in self.programs:
            kept.starts, end = {}, Counter[str]()
            for kind in self.kinds:
                if kept.used[kind] and kind not in self._rows:
                    kept.starts[kind] = end[self.buffer_of(kind)]
                    end[self.buffer_of(kind)] += kept.used[kind] * _size(self.kinds[kind])
            kept.lengths = dict(end)
        for group in groups:
            longest: dict[str, int] = {}
            for number in group:
                for name, length in self.programs[number].lengths.items():
                    longest[name] = max(longest.get(name, 0), length)
            for number in group:
                self.programs[number].lengths = longest
        for kept, count in zip(self.programs, slots, strict=True):
            for name, length in kept.lengths.items():
                self._lengths[name] = max(self._lengths.get(name, 0), count * length)

    def buffer_of(self, kind: str) -> str:
        """The name of the buffer for values of a kind."""
        return kind if kind in self._rows else f"{self.kinds[kind].dtype} end to end"

    def avals(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Abstract values of the buffers."""
        alike = {kind: (rows, *self.kinds[kind].shape) for kind, rows in self._rows.items()}
        found = {kind: jax.ShapeDtypeStruct(shape, self.kinds[kind].dtype) for kind, shape in alike.items()}
        dtypes = {self.buffer_of(kind): aval.dtype for kind, aval in self.kinds.items() if kind not in self._rows}
        return found | {name: jax.ShapeDtypeStruct((n,), dtypes[name]) for name, n in self._lengths.items()}

    def allocate(self, poison: bool, filled: bool = True) -> Buffers:
        """The buffers, filled with zeros, or with NaN if `poison`.

        Args:
          filled: without, and without `poison`, they hold anything, for buffers of which nothing is read that was not
            written: to fill gigabytes takes longer than some ops.
        """
        if poison or filled:
            return {name: blank(aval.shape, aval.dtype, poison) for name, aval in self.avals().items()}
        return {name: jax.lax.empty(aval.shape, aval.dtype) for name, aval in self.avals().items()}


class Kept:
    """What one stage program keeps of a micro-batch.

    Attributes:
      used: how many values of each kind.
      strides: how many of each kind a slot has room for, as soon as it is settled.
      starts: of the kinds that lie in a vector, where they begin in what a slot has there.
      lengths: how much a slot has of each vector.
    """

    def __init__(self, store: Store):
        self.store = store
        self.used: Counter[str] = Counter()
        self.strides: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self.lengths: dict[str, int] = {}

    def take(
        self, avals: Sequence[jax.ShapeDtypeStruct], repeats: int, in_order: bool = False, apart: bool = False
    ) -> list[Entry]:
        """Entries for values of these shapes, each made `repeats` times.

        Args:
          in_order: see `Entry`.
          apart: no two of these values share a buffer. It is for values that are read, changed and written by one op: with
            two in one buffer nothing would say that one is read before the other one is written, and XLA would copy it.
        """
        named: list[str] = []
        for number, aval in enumerate(avals):
            aval = raw_aval(aval)  # a PRNG key is kept as its words
            kind = f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
            if apart:
                kind = f"{number}: {kind}"
                self.store.apart.add(kind)
            named.append(kind)
            self.store.kinds[kind] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        per_repeat = Counter(named)
        seen: Counter[str] = Counter()
        entries: list[Entry] = []
        for kind in named:
            entries.append(Entry(self, kind, self.used[kind] + seen[kind], per_repeat[kind], in_order))
            seen[kind] += 1
        for kind, count in per_repeat.items():
            self.used[kind] += count * repeats
        return entries

    def spoil(self, buffers: Buffers, slot: jax.Array) -> Buffers:
        """The buffers with NaN in a slot, for tests."""
        buffers = dict(buffers)
        rows = {kind: count for kind, count in self.strides.items() if count and self.store.buffer_of(kind) == kind}
        for name, count in (rows | self.lengths).items():
            nothing = blank((count, *buffers[name].shape[1:]), buffers[name].dtype, True)
            if jnp.issubdtype(nothing.dtype, jnp.inexact):
                buffers[name] = jax.lax.dynamic_update_slice_in_dim(buffers[name], nothing, slot * count, 0)
        return buffers

    def place(self, entry: Entry, slot: jax.Array, repeat: Repeat) -> tuple[jax.Array, int]:
        """Where a value begins in its buffer, along dim 0, and how long it is there."""
        number = entry.start + repeat * entry.stride
        if entry.kind not in self.starts:
            return slot * self.strides[entry.kind] + number, 1
        size = _size(self.store.kinds[entry.kind])
        return slot * self.lengths[entry.buffer] + (self.starts[entry.kind] + number * size), size


def write(
    buffers: Buffers, slot: jax.Array, entries: Sequence[Entry], repeat: Repeat, values: Sequence[jax.Array]
) -> Buffers:
    """Stores the values of one repetition."""
    buffers = dict(buffers)
    for entry, value in zip(entries, values, strict=True):
        at, size = entry.program.place(entry, slot, repeat)
        whole = buffers[entry.buffer]
        value = _laid_out(raw(value), entry).reshape(size, *whole.shape[1:])
        buffers[entry.buffer] = jax.lax.dynamic_update_slice_in_dim(whole, value, at, 0)
    return buffers


def read(
    buffers: Buffers,
    slot: jax.Array,
    entries: Sequence[Entry],
    repeat: Repeat,
    avals: Sequence[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """The values that `write` stored."""
    found: list[jax.Array] = []
    for entry, aval in zip(entries, avals, strict=True):
        at, size = entry.program.place(entry, slot, repeat)
        value = jax.lax.dynamic_slice_in_dim(buffers[entry.buffer], at, size)
        value = value.reshape(entry.program.store.kinds[entry.kind].shape)
        found.append(typed(_laid_out(value, entry), aval))
    return found


def _joined(count: int, together: Sequence[Collection[int]]) -> list[set[int]]:
    """The numbers below `count` in sets: those that are in one of the collections are in one set."""
    found = [{number} for number in range(count)]
    for group in together:
        meets = [each for each in found if not each.isdisjoint(group)]
        found = [each for each in found if each.isdisjoint(group)]
        found.append({number for each in meets for number in each})
    return found


def blank(shape: tuple[int, ...], dtype: DTypeLike, poison: bool) -> jax.Array:
    """A buffer that nothing was written to: zeros, or (if `poison`) values that no result survives.

    Of unsigned integers all bits are set then: those are NaN if they are the words of floats.
    """
    if poison and jnp.issubdtype(dtype, jnp.unsignedinteger):
        return jnp.full(shape, jnp.iinfo(dtype).max, dtype)
    if poison and jnp.issubdtype(dtype, jnp.inexact):
        return jnp.full(shape, jnp.nan, dtype)
    return jnp.zeros(shape, dtype)


def _laid_out(value: jax.Array, entry: Entry) -> jax.Array:
    # In a vector everything is laid out anew anyway.
    if not entry.in_order or value.ndim < 2 or entry.buffer != entry.kind:
        return value
    return with_layout_constraint(value, Layout(tuple(range(value.ndim))))


def _size(aval: jax.ShapeDtypeStruct) -> int:
    return math.prod(aval.shape)
