"""Where the weights live: one params tree for the user, and which rank holds which part of it.

    params = {"stacked": {"Block": leaves [S, slots, ...]},      one stack per kind of repeated layer, rank r holds [r]
              "shared":  {"00_Embed": leaves in their own shape}}  every other layer, and every tied one

A stack is padded with zeros where a rank has fewer layers of the kind than the fullest one. A rank with several stages has
the layers of all of them, in the order of the layers. Shared layers are stored cut
along one dim over the ranks (where a dim divides), and gathered once per step, so that storage and optimizer state shrink
with the number of ranks. With `zero_stage=1` the arrays of both are cut over the data ranks as well, along one of the dims
that the layer made, and padded there if need be. Further axes of the mesh may cut further dims.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.layout import grouping
from jaxpipe.layout.bring import Brought
from jaxpipe.layout.entries import Pile, Shared, Stack, common, in_stack, unique
from jaxpipe.layout.frozen import Frozen, hidden
from jaxpipe.layout.placement import Placement
from jaxpipe.layout.stack_arrays import single_of_layer, stack_of_layers, take, without_padding
from jaxpipe.mesh import DATA, PIPE
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.paths import layer_name
from jaxpipe.model.precision import NO_CASTS, Precision
from jaxpipe.model.shapes import avals
from jaxpipe.model.trainable import EVERYTHING, Trainable
from jaxpipe.types import KeyPath, Params, Tree

P = PartitionSpec

# The two groups of the params tree.
STACKED, SHARED = "stacked", "shared"
# Layers of the second group that are a stack during a step.
PILED = "piled"


class Address(NamedTuple):
    """Where the weights of a layer are in the params tree: `params[group][name]`."""

    group: str
    name: str


class Layout:
    """The layout of the params of `module` cut at `boundaries`.

    Args:
      boundaries: of the stages.
      params: per layer, the shapes of its params.
      axes: the sizes of the axes of the mesh.
      zero_stage: with 1, every array is cut over the data ranks.
      own_spec: what further axes cut. It may name no axis but those, and a dim that it cuts must divide.
      precision: what a step computes in; `layer_params` are stored, `computed_params` are the same as a step sees them.
      trainable: which params are trained.
      placement: the rank of each stage; None: stage s is on rank s.

    Raises:
      LayerError: the params do not fit the module. ConfigError: `precision` or `trainable` does not fit them.
    """

    def __init__(
        self,
        module: PipelineModule,
        boundaries: Sequence[int],
        params: Sequence[Params],
        axes: Mapping[str, int] | None = None,
        zero_stage: int = 0,
        own_spec: grouping.OwnSpec | None = None,
        precision: Precision = NO_CASTS,
        trainable: Trainable = EVERYTHING,
        placement: Sequence[int] | None = None,
    ):
        self.module, self.boundaries, self.precision = module, tuple(boundaries), precision
        self.num_stages = len(self.boundaries) - 1
        self.placement = tuple(range(self.num_stages) if placement is None else placement)
        assert len(self.placement) == self.num_stages, f"{self.num_stages} stages, placed on {self.placement}"
        self.num_ranks = 1 + max(self.placement)
        self.layer_params = [avals(p) for p in params]
        grouping.check_params(module, self.layer_params)
        named = {layer_name(index): held for index, held in enumerate(self.layer_params)}
        self.computed_params = list(precision.of_layers(named).values())
        self.frozen = Frozen.of_model(module, self.layer_params, trainable)
        self._axes = {**(axes or {}), PIPE: self.num_ranks}
        self.cuts_data = zero_stage > 0 and self._axes.get(DATA, 1) > 1  # whether data ranks hold different parts
        further = [grouping.further_cuts(index, own, own_spec) for index, own in enumerate(self.layer_params)]
        fixed = [self.frozen.of(index) for index in range(module.num_layers)]
        kinds = grouping.kinds(module, self.layer_params, self.computed_params, further, fixed)
        homes = [self.rank_of(index) for index in range(module.num_layers)]
        users = [self.users(index) for index in range(module.num_layers)]
        digits = len(str(module.num_layers - 1))
        self.states: Layout | None = None  # that of the state of the layers, as soon as its shapes are known
        own_names = [f"{index:0{digits}d}_{layer.name}" for index, layer in enumerate(module.layers)]
        self.stacks: dict[str, Stack] = {}
        self.shared: dict[str, Shared] = {}
        self.piles: dict[str, Pile] = {}
        for members, is_pile in zip(kinds, self._piles(kinds, further, users), strict=True):
            shape = self.layer_params[members[0]]
            kind = common([module.layers[index].name for index in members])
            slots, places = grouping.places(members, homes)
            if len(members) > 1 and not is_pile:
                name = unique(kind, self.stacks)
                placements = jax.tree.map(self.over_data, shape, further[members[0]])
                self.stacks[name] = Stack(name, slots, places, shape, placements)
                continue
            for index in members:
                placements = jax.tree.map(self._over_ranks, shape, further[index])
                self.shared[own_names[index]] = Shared(own_names[index], index, shape, placements)
            if is_pile:
                name = unique(kind, self.piles)
                self.piles[name] = Pile(name, places, {index: own_names[index] for index in members})

    def _piles(
        self, kinds: Sequence[Sequence[int]], further: Sequence[Tree], users: Sequence[Collection[int]]
    ) -> list[bool]:
        return grouping.piles(kinds, self.layer_params, further, users)

    def over_data(self, leaf: jax.ShapeDtypeStruct, placement: Placement = Placement()) -> Placement:  # noqa: B008
        """A placement of an array of one layer that cuts it over the data ranks, too, if this layout does that."""
        return placement.cut_any(leaf.shape, DATA, self._axes) if self.cuts_data else placement

    def _over_ranks(self, leaf: jax.ShapeDtypeStruct, placement: Placement) -> Placement:
        """For a layer that is stored on its own: cut over the ranks along the largest dim that they divide, if any."""
        return self.over_data(leaf, placement.cut_even(leaf.shape, PIPE, self._axes))

    def stage_of(self, layer: int) -> int:
        """The stage that holds `layer`."""
        return next(s for s in range(self.num_stages) if layer < self.boundaries[s + 1])

    def rank_of(self, layer: int) -> int:
        """The rank that holds `layer`."""
        return self.placement[self.stage_of(layer)]

    def users(self, layer: int) -> frozenset[int]:
        """The ranks that compute with the weights of `layer`: several only for tied layers."""
        owner = self.module.owners[layer]
        return frozenset(self.rank_of(use) for use, first in enumerate(self.module.owners) if first == owner)

    def address_of(self, layer: int) -> Address | None:
        """Where the weights are that `layer` computes with (those of the first use of its tie); None if it has none."""
        owner = self.module.owners[layer]
        for stack in self.stacks.values():
            if owner in stack.places:
                return Address(STACKED, stack.name)
        found = next((name for name, shared in self.shared.items() if shared.layer == owner), None)
        return None if found is None else Address(SHARED, found)

    def place_in_step(self, layer: int) -> tuple[Address | None, int]:
        """What a step knows the weights of `layer` by, and its slot there: its pile, if it is in one, else its address."""
        address = self.address_of(layer)
        for pile in self.piles.values():
            if layer in pile.places:
                return Address(PILED, pile.name), pile.places[layer][1]
        if address is None or address.group != STACKED:
            return address, 0
        return address, self.stacks[address.name].places[self.module.owners[layer]][1]

    def placements_of(self, layer: int) -> Tree:
        """The Placement of each leaf of a layer that owns weights, its dims counted as in the layer."""
        address = self.address_of(layer)
        assert address is not None
        entries: Mapping[str, Stack | Shared] = self.stacks if address.group == STACKED else self.shared
        return entries[address.name].placements

    def trained(self, tree: Params) -> Params:
        """A tree like the params tree with None in the place of what is frozen, as gradients are."""
        return tree if self._frozen is None else hidden(self._frozen, tree)

    @functools.cached_property
    def _frozen(self) -> Params | None:
        """Whether each leaf of the params tree is frozen; None if none is."""
        if not self.frozen.any:
            return None
        return {
            STACKED: {name: self.frozen.layers[min(stack.places)] for name, stack in self.stacks.items()},
            SHARED: {name: self.frozen.layers[shared.layer] for name, shared in self.shared.items()},
        }

    # ------------------------------------------------------------------------------------------------ the params tree

    @property
    def placements(self) -> Params:
        """The Placement of each leaf of the params tree; in stacks, of the whole [S, slots, ...]."""
        return {
            STACKED: {name: jax.tree.map(in_stack, stack.placements) for name, stack in self.stacks.items()},
            SHARED: {name: shared.placements for name, shared in self.shared.items()},
        }

    @property
    def specs(self) -> Params:
        """A PartitionSpec per leaf of the params tree, for the `shard_map`: without the axes left to the compiler."""
        return jax.tree.map(lambda placement: placement.manual_spec, self.placements)

    def shardings(self, mesh: Mesh) -> Params:
        """A NamedSharding per leaf of the params tree, over all axes."""
        return jax.tree.map(lambda placement: NamedSharding(mesh, placement.spec), self.placements)

    def shapes(self) -> Params:
        """A ShapeDtypeStruct per leaf of the params tree, padding included."""

        def stacked(stack: Stack) -> Params:
            lead = (self.num_ranks, stack.slots)
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, *a.shape), a.dtype), stack.stored)

        return {
            STACKED: {name: stacked(stack) for name, stack in self.stacks.items()},
            SHARED: {name: shared.stored for name, shared in self.shared.items()},
        }

    def own_shapes(self) -> Params:
        """For each leaf of the params tree a ShapeDtypeStruct of one layer's part, as the layer made it."""
        return {
            STACKED: {name: stack.params for name, stack in self.stacks.items()},
            SHARED: {name: shared.params for name, shared in self.shared.items()},
        }

    def axes_within_ranks(self) -> frozenset[str]:
        """The axes over which the devices of one rank hold different parts of its stacks."""
        found = {DATA} if self.cuts_data else set[str]()
        for stack in self.stacks.values():
            found |= {axis for placement in jax.tree.leaves(stack.placements) for axis, _ in placement.cuts}
        return frozenset(found)

    # ------------------------------------------------------------------------------------- per-layer view, and back

    def to_layers(self, params: Params) -> list[Params]:
        """Per layer, in order, its own params in the shapes its `init` gave; `{}`-like for layers that hold none.

        What was in a stack is copied, with several processes onto the devices of its rank. A layer that is stored on its
        own is not copied, unless it is padded.
        """
        return [self.layer(params, layer) for layer in range(self.module.num_layers)]

    def owned(self, params: Params) -> dict[int, Params]:
        """The params of each layer that owns some, by its index, from a params tree of arrays or of ShapeDtypeStruct."""
        owners = [index for index in self.module.owners if self.address_of(index) is not None]
        return {layer: self.layer(params, layer) for layer in sorted(set(owners))}

    def layer(self, params: Params, index: int) -> Params:
        """One entry of what `to_layers` gives."""
        address = self.address_of(index)
        if address is None or self.module.owners[index] != index:
            return self.layer_params[index]  # without leaves
        held, made = params[address.group][address.name], self.layer_params[index]
        place = self.stacks[address.name].places[index] if address.group == STACKED else None

        def own(like: jax.ShapeDtypeStruct, leaf: Any) -> Any:
            if leaf is None:  # of gradients: frozen
                return None
            return without_padding(leaf, like.shape) if place is None else take(leaf, *place, like.shape)

        return jax.tree.map(own, made, held)

    def from_layers(self, mesh: Mesh, layers: Sequence[Params], only: Collection[Address] | None = None) -> Params:
        """The params tree on the mesh from per-layer params (see `check_layers`), array by array.

        With several processes all of them call it, with the same layers; each keeps what its devices need.

        Args:
          only: the entries of the tree to make; None: all.

        Raises:
          LayerError: an array is on devices of processes that have none in the mesh.
        """
        brought = Brought(mesh, layers)

        where = self.shardings(mesh)
        return {
            STACKED: {
                name: stack_of_layers(self.stacks[name], where[STACKED][name], self.num_ranks, brought)
                for name in self.names(STACKED, only)
            },
            SHARED: {
                name: single_of_layer(self.shared[name], where[SHARED][name], brought)
                for name in self.names(SHARED, only)
            },
        }

    def names(self, group: str, only: Collection[Address] | None = None) -> list[str]:
        """The entries of a group, in order, or those of them whose addresses are among `only`."""
        return [
            name for name in (self.stacks if group == STACKED else self.shared) if only is None or (group, name) in only
        ]


def address_and_rest(path: KeyPath) -> tuple[Address, KeyPath]:
    """The entry of the params tree that a leaf belongs to, by the path of the leaf, and the path inside of the entry."""
    return Address(path[0].key, path[1].key), path[2:]


def is_stack(path: KeyPath) -> bool:
    """Whether a leaf of the params tree, by its path, holds several layers: [S, slots, ...]."""
    return path[0].key == STACKED
