"""Translates between the training state, which depends on the mesh, and the items of a checkpoint, which do not.

The params tree has a stack [S, slots, ...] per kind of repeated layer, and so have the state of the optimizer and that of
the layers. A checkpoint has neither stacks nor stages: the item `layer_003` holds the params of layer 3, what the layer
remembers beside them, such as running means, and what the optimizer keeps about them, under the names that they have in the
state that optax makes. The item `state` holds the rest: the step, the key, the state
of a dynamic loss scale, and what the optimizer keeps about no layer, such as step counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpipe.checkpoint.items import Arrays, joined
from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.checkpoint.shares import Shares
from jaxpipe.layout.entries import Stack
from jaxpipe.layout.layout import Layout, is_stack
from jaxpipe.layout.placement import fit
from jaxpipe.layout.stack_arrays import take_on_rank
from jaxpipe.model.paths import layer_name
from jaxpipe.model.shapes import aval
from jaxpipe.model.values import raw, raw_aval
from jaxpipe.optimizer.state import StateLeaf, StatePlan
from jaxpipe.training.state import TrainState
from jaxpipe.types import AnyArray, KeyPath, Shape

STATE = "state"
PARAMS, OPT_STATE, LOSS_SCALE, LAYER_STATE = "params", "opt_state", "loss_scale", "layer_state"


def layer_item(layer: int) -> str:
    """The name of the item of a layer, such as `layer_003`."""
    return layer_name(layer)


@dataclass(frozen=True)
class Home:
    """Where a leaf of the training state is kept in a checkpoint.

    Attributes:
      names: for each item that holds a part of the leaf, the name of that part in the item.
      places: for a leaf of a stack, the (rank, slot) that each item holds; None for a leaf that one item holds whole.
      slots: the number of slots of the stack.
      shape: of the part that an item holds, as the layer made it: without stages, slots and padding.
    """

    names: dict[str, str]
    shape: Shape
    places: dict[str, tuple[int, int]] | None = None
    slots: int = 0

    def rank(self, item: str) -> int | None:
        """The rank that holds the part of an item; None for a leaf that one item holds whole."""
        return None if self.places is None else self.places[item][0]


class Homes:
    """Translates between a `TrainState` and the items of a checkpoint, for one model, optimizer and partition.

    Attributes:
      of_leaves: the home of each leaf of the state, in order.
      shares: the part that this process has in checkpoints of the state.
    """

    def __init__(self, layout: Layout, state: TrainState, plan: StatePlan, mesh: Mesh):
        self.layout, self.mesh, self.shares = layout, mesh, Shares(mesh, layout.axes_within_ranks())
        self.num_layers = layout.module.num_layers
        optimizer = _optimizer_homes(plan, layout)
        self.of_leaves: list[Home] = []
        homes = {PARAMS: _homes_of(layout, PARAMS)}
        if layout.states is not None:
            homes[LAYER_STATE] = _homes_of(layout.states, LAYER_STATE)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            field, inner = path[0].name, path[1:]
            if field in homes:
                self.of_leaves.append(homes[field][inner])
            elif field == OPT_STATE:
                where = (inner[1].key, inner[2].key) if inner[0].name == "stacked" else (None, inner[1].key)
                self.of_leaves.append(optimizer[where])
            else:
                self.of_leaves.append(Home({STATE: joined(path, "/")}, raw_aval(aval(leaf)).shape))
        names = [(item, name) for home in self.of_leaves for item, name in home.names.items()]
        assert len(set(names)) == len(names), "two leaves of the state have one name"
        # The items that hold anything, in order, with the rank where a layer of a stack lies; None for all others.
        ranks = {item: home.rank(item) for home in self.of_leaves for item in home.names}
        self._ranks = {item: ranks[item] for item in [*map(layer_item, range(self.num_layers)), STATE] if item in ranks}

    # ---------------------------------------------------------------------------------------------------------- write

    def expected(self, state: TrainState) -> dict[str, dict[str, ArraySpec]]:
        """What each item holds, by item and name. Layers that hold nothing have an entry, too."""
        found: dict[str, dict[str, ArraySpec]] = {layer_item(layer): {} for layer in range(self.num_layers)}
        found[STATE] = {}
        for home, leaf in zip(self.of_leaves, jax.tree.leaves(state), strict=True):
            dtype = str(raw_aval(aval(leaf)).dtype)
            for item, name in home.names.items():
                found[item][name] = ArraySpec(dtype, home.shape)
        return found

    def frozen(self) -> dict[str, set[str]]:
        """The paths of the params of each layer that are frozen, by item, as they are in names."""
        found: dict[str, set[str]] = {}
        for layer, held in enumerate(self.layout.frozen.layers):
            leaves = jax.tree_util.tree_flatten_with_path(held)[0]
            found[layer_item(layer)] = {joined(path, "/") for path, is_frozen in leaves if is_frozen}
        return found

    def items(self, state: TrainState) -> Iterator[tuple[str, Arrays]]:
        """Yields (item, arrays) for one item after the other. Layers that hold nothing have no item.

        The arrays have the shapes that their layer made, and lie on the devices that hold them in the state. What belongs
        to a layer of a stack is copied out of the stack only when its turn comes, so only one layer is in memory twice.

        With several processes each gets the items that it is to write. All of them have to take the items to the end,
        because there are collectives in between.
        """
        leaves = [raw(leaf) for leaf in jax.tree.leaves(state)]
        if not self.shares.group.several:
            yield from ((item, self._one_item(item, leaves)) for item in self._ranks)
            return
        gathered = [item for item, rank in self._ranks.items() if rank is None or not self.shares.writers[rank]]
        for dealt, mine in self.shares.rounds(gathered):
            arrays = [self._one_item(item, leaves, keep=item == mine) for item in dealt]
            if mine is not None:
                yield mine, arrays.pop(dealt.index(mine))
            del arrays
        for number, (item, rank) in enumerate(self._ranks.items()):
            if rank is not None and item not in gathered and self.shares.writes(rank, number):
                yield item, self._one_item(item, leaves)

    def _one_item(self, item: str, leaves: Sequence[jax.Array], keep: bool = True) -> Arrays:
        """The arrays of an item by name, or none; those of a layer of a stack are copied out of it."""
        arrays: dict[str, AnyArray] = {}
        for home, leaf in zip(self.of_leaves, leaves, strict=True):
            if item in home.names:
                place = None if home.places is None else home.places[item]
                if place is None:
                    array = fit(self.shares.whole(leaf), home.shape)
                elif self.shares.writers[place[0]]:
                    array = _one_layer(leaf, *place, home.shape)
                else:
                    array = fit(self.shares.whole(take_on_rank(leaf, *place)), home.shape)
                if keep:
                    arrays[home.names[item]] = array
                del array  # before the next one is gathered
        return arrays

    def needed(self) -> set[str]:
        """The items of which this process holds a part on its devices."""
        found: set[str] = set()
        for home in self.of_leaves:
            found |= {item for item in home.names if (r := home.rank(item)) is None or self.shares.holds(r)}
        return found


def _homes_of(layout: Layout, lead: str) -> dict[KeyPath, Home]:
    """The home of each leaf of a tree of this layout, by its path; `lead` begins the names."""
    found: dict[KeyPath, Home] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(layout.own_shapes())[0]:
        entry, inner = path[1].key, joined(path[2:], "/")
        name = f"{lead}/{inner}" if inner else lead
        if is_stack(path):
            stack = layout.stacks[entry]
            found[path] = _stack_home(stack, dict.fromkeys(stack.places, name), leaf.shape)
        else:
            found[path] = Home({layer_item(layout.shared[entry].layer): name}, leaf.shape)
    return found


def _stack_home(stack: Stack, names: Mapping[int, str], shape: Shape) -> Home:
    """The home of a leaf of a stack, from the name that it has in the item of each layer."""
    items = {layer: layer_item(layer) for layer in names}
    return Home(
        {items[layer]: name for layer, name in names.items()},
        shape,
        {items[layer]: stack.places[layer] for layer in names},
        stack.slots,
    )


def _optimizer_homes(plan: StatePlan, layout: Layout) -> dict[tuple[str | None, str], Home]:
    """The home of each array of a stored optimizer state, by (stack, name)."""
    members: dict[tuple[str | None, str], list[StateLeaf]] = {}
    for leaf in plan.leaves:
        members.setdefault((leaf.stack, leaf.name), []).append(leaf)
    homes = {}
    for (stack, name), leaves in members.items():
        if stack is not None:
            names = {leaf.layer: _optimizer_name(leaf) for leaf in leaves if leaf.layer is not None}
            homes[stack, name] = _stack_home(layout.stacks[stack], names, raw_aval(leaves[0].aval).shape)
        else:
            [leaf] = leaves
            item = STATE if leaf.layer is None else layer_item(leaf.layer)
            homes[stack, name] = Home({item: _optimizer_name(leaf)}, raw_aval(leaf.aval).shape)
    return homes


def _optimizer_name(leaf: StateLeaf) -> str:
    """The name of a leaf in its item, such as `opt_state/0:mu/w`.

    The second part is the path to the tree with one entry per layer, and the third part the path in the layer.
    """
    parts = [OPT_STATE, joined(leaf.before, ":"), joined(leaf.inside, "/")]
    return "/".join(part for part in parts if part)


@jax.jit
def _slot(stack: jax.Array, rank: int, slot: int) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(stack, rank, keepdims=False)
    return jax.lax.dynamic_index_in_dim(row, slot, keepdims=False)


def _one_layer(leaf: jax.Array, rank: int, slot: int, shape: Shape) -> AnyArray:
    """Copies one layer [...] out of a stack [S, slots, ...], of which this process holds all parts.

    If a device holds all of it, it stays there; otherwise the parts are put together on the host.
    """
    parts: dict[tuple[tuple[int, int], ...], jax.Array] = {}
    for shard in leaf.addressable_shards:
        first = shard.index[0].start or 0
        corners = tuple(part.indices(size)[:2] for part, size in zip(shard.index[2:], leaf.shape[2:], strict=True))
        if first <= rank < first + shard.data.shape[0] and corners not in parts:
            parts[corners] = _slot(shard.data, rank - first, slot)
    if len(parts) == 1:
        return fit(next(iter(parts.values())), shape)
    whole = np.empty(leaf.shape[2:], leaf.dtype)
    for corners, part in parts.items():
        whole[tuple(slice(*corner) for corner in corners)] = part
    assert sum(part.size for part in parts.values()) == whole.size, f"this process holds a part of rank {rank} only"
    return fit(whole, shape)
