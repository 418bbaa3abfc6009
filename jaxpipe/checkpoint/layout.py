"""Which array of which item holds which part of the training state. Everything that depends on the mesh ends here.

The params tree has a stack per kind of repeated layer, [S, slots, ...], and the optimizer state mirrors it. A checkpoint
has neither stacks nor stages: item `layer_003` holds the params of layer 3 and those parts of the optimizer state that
mirror them, as one layer alone would have them. The item `state` holds the rest: step, key, and what the optimizer keeps
beside its mirrors (step counts, say).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.checkpoint.items import Arrays
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
    """Where a leaf of the state is kept: under `name` in the items of all layers of `stack`, of `layer`, or in `state`."""

    name: str
    stack: Stack | None = None
    layer: int | None = None


class Layout:
    """Translates between a `TrainState` and items, for one model, optimizer and cut."""

    def __init__(self, storage: Storage, state: TrainState):
        self.storage = storage
        self.num_layers = storage.module.num_layers
        param_paths = {path: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}
        self._homes: list[_Home] = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            field, inner = path[0].name, path[1:]
            if field == PARAMS:
                self._homes.append(self._home(PARAMS, inner))
                continue
            found = mirrored(inner, param_paths) if field == OPT_STATE else None
            home = self._home(f"{OPT_STATE}/{_joined(found[0], '.')}", found[1]) if found else None
            # Of a stack, but not per layer: placeholders for moments that an optimizer does without.
            odd = (
                home is not None and home.stack is not None and leaf.shape[:2] != (storage.num_ranks, home.stack.slots)
            )
            if home is None or odd:
                home = _Home(f"{field}/{_joined(inner, '.')}" if inner else field)
            self._homes.append(home)
        names = {(home.name, home.stack.name if home.stack else home.layer) for home in self._homes}
        assert len(names) == len(self._homes), "two leaves of the state have one name"

    def _home(self, lead: str, path: tuple[Any, ...]) -> _Home:
        entry, inner = path[1].key, _joined(path[2:], "/")
        name = f"{lead}/{inner}" if inner else lead
        if is_stack(path):
            return _Home(name, stack=self.storage.stacks[entry])
        return _Home(name, layer=self.storage.shared[entry].layer)

    # ---------------------------------------------------------------------------------------------------------- write

    def expected(self, state: TrainState) -> dict[str, dict[str, ArraySpec]]:
        """What each item holds: names, dtypes and shapes. Layers that hold nothing have an entry, too."""
        found: dict[str, dict[str, ArraySpec]] = {layer_item(layer): {} for layer in range(self.num_layers)}
        found[STATE] = {}
        for home, leaf in zip(self._homes, jax.tree.leaves(state), strict=True):
            leaf = _raw(leaf)
            if home.stack is not None:
                for layer in home.stack.places:
                    found[layer_item(layer)][home.name] = ArraySpec(str(leaf.dtype), leaf.shape[2:])
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
                    arrays[home.name] = _one_layer(leaf, *home.stack.places[layer])
            if arrays:
                yield layer_item(layer), arrays
        yield (
            STATE,
            {h.name: a for h, a in zip(self._homes, leaves, strict=True) if h.stack is None and h.layer is None},
        )

    # ----------------------------------------------------------------------------------------------------------- read

    def assemble(self, state: TrainState, items: Mapping[str, Mapping[str, np.ndarray]]) -> TrainState:
        """The state with what the items hold, on the host; where they hold nothing a leaf is None.

        Args:
          state: the present one; what the items lack of a stack, and its padding, is copied from there.
        """
        leaves = [self._assemble(h, leaf, items) for h, leaf in zip(self._homes, jax.tree.leaves(state), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def _assemble(self, home: _Home, leaf: Any, items: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
        if home.stack is None:
            item = STATE if home.layer is None else layer_item(home.layer)
            return items.get(item, {}).get(home.name)
        found = {
            place: items[layer_item(layer)][home.name]
            for layer, place in home.stack.places.items()
            if home.name in items.get(layer_item(layer), {})
        }
        if not found:
            return None
        full = len(found) == self.storage.num_ranks * home.stack.slots
        whole = np.empty(leaf.shape, leaf.dtype) if full else np.array(leaf)
        for place, array in found.items():
            whole[place] = array
        return whole


def place(loaded: TrainState, state: TrainState, shardings: TrainState) -> TrainState:
    """Puts what was loaded onto the mesh, leaf by leaf in place of the present state, which is used up.

    Never more than one leaf is on the devices twice.
    """

    def one(new: Any, old: jax.Array, sharding: Any) -> jax.Array:
        if new is None:
            return old
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            new = jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old))
        # Not `device_put` of the numpy array itself: a donated step must not write into memory that numpy owns.
        placed = jax.block_until_ready(jax.device_put(new, sharding, may_alias=False))
        old.delete()
        return placed

    return jax.tree.map(one, loaded, state, shardings, is_leaf=lambda leaf: leaf is None)


def _joined(path: tuple[Any, ...], separator: str) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def _raw(leaf: Any) -> Any:
    """Typed PRNG keys as the integers they are made of."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@jax.jit
def _slot(stack: jax.Array, rank: Any, slot: Any) -> jax.Array:
    return stack[rank, slot]


def _one_layer(leaf: jax.Array, rank: int, slot: int) -> jax.Array:
    """One layer of a stack [S, slots, ...], copied on a device that holds it."""
    for shard in leaf.addressable_shards:
        first = shard.index[0].start or 0
        if first <= rank < first + shard.data.shape[0]:
            return _slot(shard.data, rank - first, slot)
    raise AssertionError(f"no device of this process holds rank {rank}")
