"""What one rank computes between two gathers: like equations of its layers as one, on its rows of the stacks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.model.layout import Stack
from jaxpipe.optimizer.calls import masked_while
from jaxpipe.optimizer.trace import Equation, Value

Place = tuple[int, int]  # (rank, slot)


@dataclass
class Rows:
    """The values of one rank; its methods run inside `shard_map`.

    Attributes:
      rank: this rank, a traced integer. num_ranks: S.
      stacks: by name.
      batches: arrays [K, ...] by key: this rank's rows of [S, K, ...].
      slots: per batch, which slots of its stack its K rows are.
      loose: values without home.
    """

    rank: jax.Array
    num_ranks: int
    stacks: Mapping[str, Stack]
    batches: dict[Any, jax.Array]
    slots: dict[Any, list[int]]
    loose: Mapping[Value, Any]

    def compute(self, group: Sequence[Equation]) -> None:
        """Computes like equations of several layers, on the slots where some rank has one of these layers."""
        eqn = group[0]
        assert eqn.home is not None
        places = self.stacks[eqn.home[0]].places
        rows = {places[each.home[1]]: each for each in group if each.home is not None}
        slots = sorted({slot for _, slot in rows})
        operands = [
            self.fetch({place: e.inputs[i] for place, e in rows.items()}, slots) for i in range(len(eqn.inputs))
        ]
        wanted = None
        if eqn.primitive.name == "while" and len(rows) < self.num_ranks * len(slots):
            wanted = self._mask(rows, slots)
        for v, out in zip(eqn.outputs, self._each_row(eqn, operands, len(slots), wanted), strict=True):
            self.batches[v.batch], self.slots[v.batch] = out, slots

    def _each_row(
        self, eqn: Equation, operands: Sequence[tuple[Any, bool]], count: int, wanted: jax.Array | None
    ) -> list[Any]:
        """One equation on all rows; operands are (array, whether it has a row per slot)."""
        args: list[Any] = [array for array, _ in operands]
        axes: list[int | None] = [0 if by_row else None for _, by_row in operands]
        function: Any = eqn.bind
        if wanted is not None:
            function = lambda wanted, *args: masked_while(eqn.params, wanted, *args)  # noqa: E731
            args, axes = [wanted, *args], [0, *axes]
        if all(axis is None for axis in axes):
            return [jnp.broadcast_to(out, (count, *out.shape)) for out in function(*args)]

        def one(i: Any) -> Any:
            return function(*[a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)])

        if (
            count == 1
        ):  # as it is: `vmap` would turn a conditional into a select, and a matrix product into a batched one
            return [out[None] for out in one(0)]
        if _is_random(eqn) and not _is_threefry(eqn):
            # Under vmap, generators other than threefry give other numbers than row by row.
            return jax.lax.map(one, jnp.arange(count))
        return jax.vmap(function, axes)(*args)

    def fetch(self, rows: Mapping[Place, Value], slots: Sequence[int]) -> tuple[Any, bool]:
        """One operand, for the layers at `rows`: (array, whether it is [K, ...] or one value for all).

        Rows of other layers hold anything.
        """
        alone = {place: v for place, v in rows.items() if not v.home}
        held: dict[Any, list[Place]] = {}
        for place, v in rows.items():
            if v.home:
                held.setdefault(v.batch, []).append(place)
        result = None
        if alone:
            first = next(iter(alone.values()))
            several = len(set(alone.values())) > 1
            if not several and not held:
                return self._loose(first), False
            if several:
                grid = [self._loose(alone.get((r, k), first)) for r in range(self.num_ranks) for k in slots]
                table = jnp.stack([jnp.asarray(a, first.aval.dtype) for a in grid])
                result = self._mine(table.reshape(self.num_ranks, len(slots), *table.shape[1:]))
            else:
                value = jnp.asarray(self._loose(first), first.aval.dtype)
                result = jnp.broadcast_to(value, (len(slots), *value.shape))
        for key, places in held.items():
            # A slot that the batch does not have is read by none of these layers: any row will do.
            at = [self.slots[key].index(slot) if slot in self.slots[key] else 0 for slot in slots]
            array = self.batches[key]
            if at != list(range(array.shape[0])):
                array = jnp.stack([array[i] for i in at])
            if result is not None:
                array = jnp.where(_wide(self._mask(places, slots), array), array, result)
            result = array
        return result, True

    def stored(self, stack: Stack, rows: Mapping[Place, Value]) -> jax.Array:
        """A row [slots, ...] as it is stored: the values of the layers at `rows`, zeros elsewhere."""
        slots = list(range(stack.slots))
        array, by_row = self.fetch(rows, slots)
        if not by_row:
            array = jnp.asarray(array, next(iter(rows.values())).aval.dtype)
            array = jnp.broadcast_to(array, (len(slots), *array.shape))
        if len(rows) < self.num_ranks * stack.slots and not jnp.issubdtype(array.dtype, jax.dtypes.extended):
            array = jnp.where(_wide(self._mask(rows, slots), array), array, jnp.zeros_like(array))
        return array

    def _loose(self, v: Value) -> Any:
        return v.constant if v.constant is not None else self.loose[v]

    def _mask(self, places: Iterable[Place], slots: Sequence[int]) -> jax.Array:
        """bool [K], whether this rank's row is among `places`."""
        table = np.zeros((self.num_ranks, len(slots)), bool)
        for rank, slot in places:
            table[rank, slots.index(slot)] = True
        return self._mine(jnp.asarray(table))

    def _mine(self, table: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(table, self.rank, keepdims=False)


def _wide(mask: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(mask.reshape(-1, *[1] * (like.ndim - 1)), like.shape)


def _is_random(eqn: Equation) -> bool:
    return eqn.primitive.name.startswith("random_")


def _is_threefry(eqn: Equation) -> bool:
    keys = [v.aval.dtype for v in (*eqn.inputs, *eqn.outputs) if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)]
    return all("fry" in str(key) for key in keys)
