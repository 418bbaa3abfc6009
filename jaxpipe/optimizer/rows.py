"""What one rank computes between two gathers: each group of equations as one, on the rank's own rows of the stacks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpipe.layout.entries import Stack
from jaxpipe.optimizer import padded
from jaxpipe.optimizer.calls import masked_while
from jaxpipe.optimizer.trace import ArrayKey, Equation, Value
from jaxpipe.types import Shape

Place = tuple[int, int]  # (rank, slot)


@dataclass
class Rows:
    """The values of one rank; its methods run inside `shard_map`.

    Attributes:
      rank: the number of this rank, a traced int32 [].
      num_ranks: S.
      stacks: all stacks of the layout, by name.
      arrays: arrays [K, ...] by key; each is this rank's rows of an array [S, K, ...].
      slots: for each of these arrays, the slots of its stack that its K rows are.
      loose: the values without a home.
    """

    rank: jax.Array
    num_ranks: int
    stacks: Mapping[str, Stack]
    arrays: dict[ArrayKey, jax.Array]
    slots: dict[ArrayKey, list[int]]
    loose: Mapping[Value, ArrayLike]

    def compute(self, group: Sequence[Equation]) -> None:
        """Computes a group, on all slots where some rank has a layer of the group, and adds its outputs to `arrays`."""
        eqn = group[0]
        assert eqn.home is not None
        places = self.stacks[eqn.home[0]].places
        rows = {places[each.home[1]]: each for each in group if each.home is not None}
        slots = sorted({slot for _, slot in rows})
        inputs = [{place: e.inputs[i] for place, e in rows.items()} for i in range(len(eqn.inputs))]
        wide = padded.form(eqn, [self._shape(values.values()) for values in inputs])
        operands = []
        for number, values in enumerate(inputs):
            array, by_row = self.fetch(values, slots, wide)
            operands.append((padded.operand(eqn, number, array, wide, lead=int(by_row)), by_row))
        wanted = None
        if eqn.primitive.name == "while" and len(rows) < self.num_ranks * len(slots):
            wanted = self._mask(rows, slots)
        for v, out in zip(eqn.outputs, self._each_row(eqn, operands, len(slots), wanted), strict=True):
            self.arrays[v.held_in], self.slots[v.held_in] = out, slots

    def _each_row(
        self, eqn: Equation, operands: Sequence[tuple[ArrayLike, bool]], count: int, wanted: jax.Array | None
    ) -> list[jax.Array]:
        """One equation on all rows.

        Args:
          operands: as `fetch` gives them.
          count: K, the number of rows.
          wanted: bool [K], for a `while` equation: the rows of layers, which padding is not.

        Returns:
          The outputs of the equation, [K, ...].
        """
        args: list[Any] = [array for array, _ in operands]
        axes: list[int | None] = [0 if by_row else None for _, by_row in operands]
        function: Callable[..., list[jax.Array]] = eqn.bind
        if wanted is not None:
            function = lambda wanted, *args: masked_while(eqn.params, wanted, *args)  # noqa: E731
            args, axes = [wanted, *args], [0, *axes]
        if all(axis is None for axis in axes):
            return [jnp.broadcast_to(out, (count, *out.shape)) for out in function(*args)]

        def one(i: int | jax.Array) -> list[jax.Array]:
            return function(*[a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)])

        if count == 1:
            # Without `vmap`, which would turn a conditional into a select, and a matrix product into a batched one.
            return [out[None] for out in one(0)]
        if _is_random(eqn) and not _is_threefry(eqn):
            # Under `vmap`, generators other than threefry give other numbers than row by row.
            return jax.lax.map(one, jnp.arange(count))
        return jax.vmap(function, axes)(*args)

    def _shape(self, values: Iterable[Value]) -> Shape:
        """The shape in which values, which have one in the trace, are there; a padded one if one of them is padded."""
        found = [self.arrays[v.held_in].shape[1:] if v.home else np.shape(self._loose(v)) for v in values]
        own = next(iter(values)).aval.shape
        return next((shape for shape in found if shape != own), own)

    def fetch(self, rows: Mapping[Place, Value], slots: Sequence[int], wide: Shape | None = None) -> tuple[Any, bool]:
        """One operand of a group.

        Args:
          rows: the value that each layer of the group reads, by the place of the layer.
          slots: the K slots that are computed.
          wide: the padded shape that arrays which are no scalars are to have; None: the shape in the trace.

        Returns:
          An array [K, ...] and True; or one array [...] that all layers read, and False. In an array [K, ...] the rows
          of layers that are not in `rows` hold arbitrary numbers.
        """
        own = next(iter(rows.values())).aval.shape
        shape = wide if wide is not None and own else own
        alone = {place: v for place, v in rows.items() if not v.home}
        held: dict[ArrayKey, list[Place]] = {}
        for place, v in rows.items():
            if v.home:
                held.setdefault(v.held_in, []).append(place)
        result = None
        if alone:
            first = next(iter(alone.values()))
            several = len(set(alone.values())) > 1
            if not several and not held:
                return padded.fitted(self._loose(first), shape), False
            if several:
                grid = [self._loose(alone.get((r, k), first)) for r in range(self.num_ranks) for k in slots]
                table = jnp.stack([jnp.asarray(padded.fitted(a, shape), first.aval.dtype) for a in grid])
                result = self._mine(table.reshape(self.num_ranks, len(slots), *table.shape[1:]))
            else:
                value = jnp.asarray(padded.fitted(self._loose(first), shape), first.aval.dtype)
                result = jnp.broadcast_to(value, (len(slots), *value.shape))
        for key, places in held.items():
            # None of these layers reads a slot that the array does not have, so any row will do.
            at = [self.slots[key].index(slot) if slot in self.slots[key] else 0 for slot in slots]
            array = self.arrays[key]
            array = padded.fitted(array, (array.shape[0], *shape))
            if at != list(range(array.shape[0])):
                array = jnp.stack([array[i] for i in at])
            if result is not None:
                array = jnp.where(_wide(self._mask(places, slots), array), array, result)
            result = array
        return result, True

    def stored(self, stack: Stack, rows: Mapping[Place, Value]) -> jax.Array:
        """This rank's row [slots, ...] of a stored array: the values of the layers at `rows`, and zeros elsewhere.

        It has padding, filled with zeros, if the values are there with padding.
        """
        slots, own = list(range(stack.slots)), next(iter(rows.values())).aval.shape
        array, by_row = self.fetch(rows, slots, self._shape(rows.values()))
        if not by_row:
            array = jnp.asarray(array, next(iter(rows.values())).aval.dtype)
            array = jnp.broadcast_to(array, (len(slots), *array.shape))
        array = padded.zeroed(array, (len(slots), *own))
        if len(rows) < self.num_ranks * stack.slots and not jnp.issubdtype(array.dtype, jax.dtypes.extended):
            array = jnp.where(_wide(self._mask(rows, slots), array), array, jnp.zeros_like(array))
        return array

    def _loose(self, v: Value) -> ArrayLike:
        return v.constant if v.constant is not None else self.loose[v]

    def _mask(self, places: Iterable[Place], slots: Sequence[int]) -> jax.Array:
        """bool [K]: for each slot, whether `places` has it on this rank."""
        table = np.zeros((self.num_ranks, len(slots)), bool)
        for rank, slot in places:
            table[rank, slots.index(slot)] = True
        return self._mine(jnp.asarray(table))

    def _mine(self, table: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(table, self.rank, keepdims=False)


def _wide(mask: jax.Array, like: jax.Array) -> jax.Array:
    """A mask [K] in the shape [K, ...] of `like`."""
    return jnp.broadcast_to(mask.reshape(-1, *[1] * (like.ndim - 1)), like.shape)


def _is_random(eqn: Equation) -> bool:
    return eqn.primitive.name.startswith("random_")


def _is_threefry(eqn: Equation) -> bool:
    keys = [v.aval.dtype for v in (*eqn.inputs, *eqn.outputs) if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)]
    return all("fry" in str(key) for key in keys)
