"""Translates between the training state, which depends on the mesh, and the items of a checkpoint, which do not.

The params tree has a stack [S, slots, ...] per kind of repeated layer, and so has the state of the optimizer. A checkpoint
has neither stacks nor stages: the item `layer_003` holds the params of layer 3 and what the optimizer keeps about them,
under the names that they have in the state that optax makes. The item `state` holds the rest: the step, the key, and what
the optimizer keeps about no layer, such as step counts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.checkpoint.items import Arrays, joined
from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.model.layout import Layout, Stack, is_stack, layer_name
from jaxpipe.optimizer.state import StateLeaf, StatePlan
from jaxpipe.training.state import TrainState
from jaxpipe.types import AnyArray, KeyPath

STATE = "state"
PARAMS, OPT_STATE = "params", "opt_state"


def layer_item(layer: int) -> str:
    """The name of the item of a layer, such as `layer_003`."""
    return layer_name(layer)


@dataclass(frozen=True)
class _Home:
    """Where a leaf of the training state is kept in a checkpoint.

    Attributes:
      names: for each item that holds a part of the leaf, the name of that part in the item.
      places: for a leaf of a stack, the (rank, slot) that each item holds; None for a leaf that one item holds whole.
      slots: the number of slots of the stack.
    """

    names: dict[str, str]
    places: dict[str, tuple[int, int]] | None = None
    slots: int = 0


class Homes:
    """Translates between a `TrainState` and the items of a checkpoint, for one model, optimizer and partition."""

    def __init__(self, layout: Layout, state: TrainState, plan: StatePlan):
        self.layout = layout
        self.num_layers = layout.module.num_layers
        optimizer = _optimizer_homes(plan, layout)
        self._homes: list[_Home] = []
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
            field, inner = path[0].name, path[1:]
            if field == PARAMS:
                self._homes.append(self._of_param(inner))
            elif field == OPT_STATE:
                where = (inner[1].key, inner[2].key) if inner[0].name == "stacked" else (None, inner[1].key)
                self._homes.append(optimizer[where])
            else:
                self._homes.append(_Home({STATE: field}))
        names = [(item, name) for home in self._homes for item, name in home.names.items()]
        assert len(set(names)) == len(names), "two leaves of the state have one name"

    def _of_param(self, path: KeyPath) -> _Home:
        entry, inner = path[1].key, joined(path[2:], "/")
        name = f"{PARAMS}/{inner}" if inner else PARAMS
        if is_stack(path):
            return _stack_home(self.layout.stacks[entry], dict.fromkeys(self.layout.stacks[entry].places, name))
        return _Home({layer_item(self.layout.shared[entry].layer): name})

    # ---------------------------------------------------------------------------------------------------------- write

    def expected(self, state: TrainState) -> dict[str, dict[str, ArraySpec]]:
        """What each item holds, by item and name. Layers that hold nothing have an entry, too."""
        found: dict[str, dict[str, ArraySpec]] = {layer_item(layer): {} for layer in range(self.num_layers)}
        found[STATE] = {}
        for home, leaf in zip(self._homes, jax.tree.leaves(state), strict=True):
            leaf = _raw(leaf)
            shape = leaf.shape if home.places is None else leaf.shape[2:]
            for item, name in home.names.items():
                found[item][name] = ArraySpec(str(leaf.dtype), shape)
        return found

    def items(self, state: TrainState) -> Iterator[tuple[str, Arrays]]:
        """Yields (item, arrays) for one item after the other. Layers that hold nothing have no item.

        The arrays have the shapes that their layer made, and lie on the devices that hold them in the state. What belongs
        to a layer of a stack is copied out of the stack only when its turn comes, so only one layer is in memory twice.
        """
        leaves = [_raw(leaf) for leaf in jax.tree.leaves(state)]
        for item in [*map(layer_item, range(self.num_layers)), STATE]:
            arrays: dict[str, AnyArray] = {}
            for home, leaf in zip(self._homes, leaves, strict=True):
                if item in home.names:
                    place = None if home.places is None else home.places[item]
                    arrays[home.names[item]] = leaf if place is None else _one_layer(leaf, *place)
            if arrays or item == STATE:
                yield item, arrays

    # ----------------------------------------------------------------------------------------------------------- read

    def assembly(self, state: TrainState, wanted: Mapping[str, Collection[str]]) -> "Assembly":
        """An `Assembly` that takes items one after the other and makes a state of them."""
        return Assembly(self._homes, state, wanted)


class Assembly:
    """A training state that is being put together on the host.

    Args:
      state: the present state. Rows of a stack for which no item comes, and its padding, are copied from there.
      wanted: for each item, the names of the arrays that will come.
    """

    def __init__(self, homes: Sequence[_Home], state: TrainState, wanted: Mapping[str, Collection[str]]):
        self._homes, self._wanted = homes, wanted
        self._present = jax.tree.leaves(state)
        self._leaves: list[Any] = [None] * len(homes)

    def put(self, item: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the arrays of an item, by name, in the shapes that the layer made."""
        for index, home in enumerate(self._homes):
            name = home.names.get(item)
            if name is None or name not in arrays:
                continue
            if home.places is None:
                self._leaves[index] = arrays[name]
                continue
            if self._leaves[index] is None:
                self._leaves[index] = self._blank(home, self._present[index])
            self._leaves[index][home.places[item]] = arrays[name]

    def _blank(self, home: _Home, present: jax.Array) -> np.ndarray:
        raw = _raw(present)
        coming = sum(name in self._wanted.get(item, ()) for item, name in home.names.items())
        if coming == raw.shape[0] * home.slots:
            return np.empty(raw.shape, raw.dtype)
        return np.array(raw)

    def place(self, state: TrainState, shardings: TrainState) -> tuple[TrainState, BaseException | None]:
        """Puts the new leaves on the mesh, one by one in the place of those of the present state, which are deleted.

        Never more than one leaf is on the devices twice. A leaf for which no item came stays as it is.

        Returns:
          The new state, and None. If something goes wrong on the way: a state in which only some leaves are new, and the
          error.
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
                # A copy, because a donated step must not write into memory that NumPy owns.
                leaves[index] = jax.block_until_ready(jax.device_put(new, sharding, may_alias=False))
                old.delete()
        except BaseException as error:  # also an interrupt from the keyboard
            return jax.tree.unflatten(structure, leaves), error
        return jax.tree.unflatten(structure, leaves), None


def _stack_home(stack: Stack, names: Mapping[int, str]) -> _Home:
    """The home of a leaf of a stack, from the name that it has in the item of each layer."""
    items = {layer: layer_item(layer) for layer in names}
    return _Home(
        {items[layer]: name for layer, name in names.items()},
        {items[layer]: stack.places[layer] for layer in names},
        stack.slots,
    )


def _optimizer_homes(plan: StatePlan, layout: Layout) -> dict[tuple[str | None, str], _Home]:
    """The home of each array of a stored optimizer state, by (stack, name)."""
    members: dict[tuple[str | None, str], list[StateLeaf]] = {}
    for leaf in plan.leaves:
        members.setdefault((leaf.stack, leaf.name), []).append(leaf)
    homes = {}
    for (stack, name), leaves in members.items():
        if stack is not None:
            names = {leaf.layer: _optimizer_name(leaf) for leaf in leaves if leaf.layer is not None}
            homes[stack, name] = _stack_home(layout.stacks[stack], names)
        else:
            [leaf] = leaves
            item = STATE if leaf.layer is None else layer_item(leaf.layer)
            homes[stack, name] = _Home({item: _optimizer_name(leaf)})
    return homes


def _optimizer_name(leaf: StateLeaf) -> str:
    """The name of a leaf in its item, such as `opt_state/0:mu/w`.

    The second part is the path to the tree with one entry per layer, and the third part the path in the layer.
    """
    parts = [OPT_STATE, joined(leaf.before, ":"), joined(leaf.inside, "/")]
    return "/".join(part for part in parts if part)


def _raw(leaf: jax.Array) -> jax.Array:
    """A leaf of plain numbers: a typed PRNG key becomes the integers that it is made of."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@jax.jit
def _slot(stack: jax.Array, rank: int, slot: int) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(stack, rank, keepdims=False)
    return jax.lax.dynamic_index_in_dim(row, slot, keepdims=False)


def _one_layer(leaf: jax.Array, rank: int, slot: int) -> jax.Array:
    """Copies one layer [...] out of a stack [S, slots, ...], on a device that holds it."""
    for shard in leaf.addressable_shards:
        first = shard.index[0].start or 0
        if first <= rank < first + shard.data.shape[0]:
            return _slot(shard.data, rank - first, slot)
    raise AssertionError(f"no device of this process holds rank {rank}")
