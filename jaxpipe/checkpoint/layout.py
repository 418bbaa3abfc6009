"""Which array of which item holds which part of the training state. Everything that depends on the mesh ends here.

The params tree has a stack per kind of repeated layer, [S, slots, ...], and the optimizer state mirrors it. A checkpoint
has neither stacks nor stages: item `layer_003` holds the params of layer 3 and those parts of the optimizer state that
mirror them, as one layer alone would have them. The item `state` holds the rest: step, key, and what the optimizer keeps
beside its mirrors (step counts, say).
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.checkpoint.items import Arrays, joined
from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.model.storage import Stack, Storage, is_stack
from jaxpipe.training.state import TrainState, mirrored

STATE = "state"
PARAMS, OPT_STATE = "params", "opt_state"


def layer_item(layer: int) -> str:
    """Name of the item of a layer."""
    return f"layer_{layer:03d}"


@dataclass(frozen=True)
class _Home:
    """Where a leaf of the state is kept: under `name` in the items of all layers of `stack`, of `layer`, or in `state`.

    Of a leaf of a stack, dims `axis` and `axis + 1` are rank and slot.
    """

    name: str
    stack: Stack | None = None
    layer: int | None = None
    axis: int = 0


class Layout:
    """Translates between a `TrainState` and items, for one model, optimizer and cut.

    Args:
      axes: of `training.state.make_state`.
    """

    def __init__(self, storage: Storage, state: TrainState, axes: Sequence[int | None]):
        self.storage = storage
        self.num_layers = storage.module.num_layers
        param_paths = {path: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}
        self._homes: list[_Home] = []
        stack_axes = iter(axes)
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
            field, inner = path[0].name, path[1:]
            if field == PARAMS:
                self._homes.append(self._home(PARAMS, inner, 0))
            elif field == OPT_STATE:
                axis, found = next(stack_axes), mirrored(inner, param_paths)
                # None for what belongs to a stack, but not per layer: placeholders for moments that are not kept.
                if found and not (is_stack(found[1]) and axis is None):
                    lead = f"{OPT_STATE}/{joined(found[0], ':')}" if found[0] else OPT_STATE
                    self._homes.append(self._home(lead, found[1], axis or 0))
                else:
                    self._homes.append(_Home(f"{OPT_STATE}/{joined(inner, ':')}"))
            else:
                self._homes.append(_Home(field))
        names = {(home.name, home.stack.name if home.stack else home.layer) for home in self._homes}
        assert len(names) == len(self._homes), "two leaves of the state have one name"

    def _home(self, lead: str, path: tuple[Any, ...], axis: int) -> _Home:
        entry, inner = path[1].key, joined(path[2:], "/")
        name = f"{lead}/{inner}" if inner else lead
        if is_stack(path):
            return _Home(name, stack=self.storage.stacks[entry], axis=axis)
        return _Home(name, layer=self.storage.shared[entry].layer)

    # ---------------------------------------------------------------------------------------------------------- write

    def expected(self, state: TrainState) -> dict[str, dict[str, ArraySpec]]:
        """What each item holds: names, dtypes and shapes. Layers that hold nothing have an entry, too."""
        found: dict[str, dict[str, ArraySpec]] = {layer_item(layer): {} for layer in range(self.num_layers)}
        found[STATE] = {}
        for home, leaf in zip(self._homes, jax.tree.leaves(state), strict=True):
            leaf = _raw(leaf)
            if home.stack is not None:
                shape = leaf.shape[: home.axis] + leaf.shape[home.axis + 2 :]
                for layer in home.stack.places:
                    found[layer_item(layer)][home.name] = ArraySpec(str(leaf.dtype), shape)
            else:
                item = STATE if home.layer is None else layer_item(home.layer)
                found[item][home.name] = ArraySpec(str(leaf.dtype), leaf.shape)
        return found

    def items(self, state: TrainState) -> Iterator[tuple[str, Arrays]]:
        """Item after item, on the devices that hold them; layers without params have none.

        What belongs to one layer of a stack is copied out when its turn comes: only one layer is in memory twice.
        """
        leaves = [_raw(leaf) for leaf in jax.tree.leaves(state)]
        for layer in range(self.num_layers):
            arrays: Arrays = {}
            for home, leaf in zip(self._homes, leaves, strict=True):
                if home.layer == layer:
                    arrays[home.name] = leaf
                elif home.stack is not None and layer in home.stack.places:
                    arrays[home.name] = _one_layer(leaf, *home.stack.places[layer], home.axis)
            if arrays:
                yield layer_item(layer), arrays
        yield (
            STATE,
            {h.name: a for h, a in zip(self._homes, leaves, strict=True) if h.stack is None and h.layer is None},
        )

    # ----------------------------------------------------------------------------------------------------------- read

    def assembly(self, state: TrainState, wanted: Mapping[str, Collection[str]]) -> "Assembly":
        """Takes items one after the other, and makes a state of them; see `Assembly`."""
        return Assembly(self._homes, state, wanted)


class Assembly:
    """A state that is being put together on the host.

    Args:
      state: the present one; what no item has of a stack, and its padding, is copied from there.
      wanted: per item, the names of the arrays that will come.
    """

    def __init__(self, homes: Sequence[_Home], state: TrainState, wanted: Mapping[str, Collection[str]]):
        self._homes, self._wanted = homes, wanted
        self._present = jax.tree.leaves(state)
        self._leaves: list[Any] = [None] * len(homes)

    def put(self, item: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what an item holds."""
        for index, home in enumerate(self._homes):
            if home.name not in arrays:
                continue
            if home.stack is None:
                if item == (STATE if home.layer is None else layer_item(home.layer)):
                    self._leaves[index] = arrays[home.name]
                continue
            place = next((at for layer, at in home.stack.places.items() if layer_item(layer) == item), None)
            if place is not None:
                if self._leaves[index] is None:
                    self._leaves[index] = self._blank(home, home.stack, self._present[index])
                self._leaves[index][(slice(None),) * home.axis + place] = arrays[home.name]

    def _blank(self, home: _Home, stack: Stack, present: jax.Array) -> np.ndarray:
        coming = sum(home.name in self._wanted.get(layer_item(layer), ()) for layer in stack.places)
        if coming == present.shape[home.axis] * stack.slots:
            return np.empty(present.shape, present.dtype)
        return np.array(present)

    def place(self, state: TrainState, shardings: TrainState) -> tuple[TrainState, BaseException | None]:
        """Puts everything onto the mesh, leaf by leaf in place of the present state, which is used up.

        Never more than one leaf is on the devices twice. What no item had anything of stays.

        Returns:
          The new state. If something went wrong on the way, a state of which a part is new, and the error.
        """
        leaves, structure = jax.tree.flatten(state)
        where = structure.flatten_up_to(shardings)
        self._present.clear()
        try:
            for index, (old, sharding) in enumerate(zip(leaves, where, strict=True)):
                new, self._leaves[index] = self._leaves[index], None
                if new is None:
                    continue
                if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
                    new = jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old))
                # A copy: a donated step must not write into memory that numpy owns.
                leaves[index] = jax.block_until_ready(jax.device_put(new, sharding, may_alias=False))
                old.delete()
        except BaseException as error:  # an interrupt from the keyboard, too
            return jax.tree.unflatten(structure, leaves), error
        return jax.tree.unflatten(structure, leaves), None


def _raw(leaf: Any) -> Any:
    """Typed PRNG keys as the integers they are made of."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@functools.partial(jax.jit, static_argnames="axis")
def _slot(stack: jax.Array, rank: Any, slot: Any, axis: int) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(stack, rank, axis, keepdims=False)
    return jax.lax.dynamic_index_in_dim(row, slot, axis, keepdims=False)


def _one_layer(leaf: jax.Array, rank: int, slot: int, axis: int) -> jax.Array:
    """One layer of a stack [..., S, slots, ...], copied on a device that holds it."""
    for shard in leaf.addressable_shards:
        first = shard.index[axis].start or 0
        if first <= rank < first + shard.data.shape[axis]:
            return _slot(shard.data, rank - first, slot, axis)
    raise AssertionError(f"no device of this process holds rank {rank}")
