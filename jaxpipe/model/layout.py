"""Where the weights live: one params tree for the user, and which rank holds which part of it.

    params = {"stacked": {"Block": leaves [S, slots, ...]},      one stack per kind of repeated layer, rank r holds [r]
              "shared":  {"00_Embed": leaves in their own shape}}  every other layer, and every tied one

A stack is padded with zeros where a stage has fewer layers of the kind than the fullest one. Shared layers are stored cut
along one dim over the ranks (where a dim divides), and gathered once per step, so that storage and optimizer state shrink
with the number of ranks.
"""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.errors import LayerError
from jaxpipe.mesh import PIPE
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.placement import Placement
from jaxpipe.model.shapes import avals, describe, signature
from jaxpipe.types import Avals, KeyPath, Params, Tree

P = PartitionSpec

# The two groups of the params tree.
STACKED, SHARED = "stacked", "shared"


class Address(NamedTuple):
    """Where the weights of a layer are in the params tree: `params[group][name]`."""

    group: str
    name: str


@dataclass(frozen=True)
class Stack:
    """Layers of one kind: `places[layer] = (rank, slot)`, and the shapes of one layer's params."""

    name: str
    slots: int
    places: dict[int, tuple[int, int]]
    params: Params


@dataclass(frozen=True)
class Shared:
    """A layer that is stored on its own, and the `Placement` of each of its leaves."""

    name: str
    layer: int
    params: Avals
    placements: Tree = field(repr=False)


class Layout:
    """The layout of the params of `module` cut at `boundaries`, one stage per rank.

    Args:
      params: per layer, the shapes of its params.
    """

    def __init__(self, module: PipelineModule, boundaries: Sequence[int], params: Sequence[Params]):
        self.module, self.boundaries = module, tuple(boundaries)
        self.num_ranks = len(self.boundaries) - 1
        self.layer_params = [avals(p) for p in params]
        self._check_params()
        self._builders: dict[Mesh, Any] = {}  # compiled once per mesh, however often layers are taken in
        kinds: dict[Any, list[int]] = {}
        for index, layer in enumerate(module.layers):
            if module.owners[index] == index and jax.tree.leaves(params[index]):
                alone = index if layer.tie is not None else -1  # a tied layer is never stacked
                kinds.setdefault((layer.kind, signature(params[index]), alone), []).append(index)
        digits = len(str(module.num_layers - 1))
        self.stacks: dict[str, Stack] = {}
        self.shared: dict[str, Shared] = {}
        for members in kinds.values():
            name, shape = module.layers[members[0]].name, self.layer_params[members[0]]
            if len(members) > 1:
                name = _unique(_common([module.layers[index].name for index in members]), self.stacks)
                self.stacks[name] = self._stack(name, members, shape)
            else:
                name = f"{members[0]:0{digits}d}_{name}"
                self.shared[name] = Shared(name, members[0], shape, jax.tree.map(self._placement, shape))

    def _check_params(self) -> None:
        for index, held in enumerate(self.layer_params):
            owner = self.module.owners[index]
            if owner != index and jax.tree.leaves(held):
                raise LayerError(
                    f"{self.module.label(index)} was given params, but it is tied to {self.module.label(owner)}, which "
                    "holds them: give an empty dict for every later use of a tie."
                )
            if any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in jax.tree.leaves(held)):
                raise LayerError(f"{self.module.label(index)} has a PRNG key among its params: {describe(held)}.")

    def _stack(self, name: str, members: list[int], shape: Params) -> Stack:
        used = [0] * self.num_ranks
        places: dict[int, tuple[int, int]] = {}
        for index in members:
            rank = self.stage_of(index)
            places[index] = (rank, used[rank])
            used[rank] += 1
        return Stack(name, max(used), places, shape)

    def _placement(self, leaf: jax.ShapeDtypeStruct) -> Placement:
        """Cut over the ranks along the largest dim that they divide, if there is one."""
        dims = [dim for dim, size in enumerate(leaf.shape) if size and size % self.num_ranks == 0]
        if not dims or self.num_ranks == 1:
            return Placement()
        return Placement(((PIPE, max(dims, key=lambda dim: leaf.shape[dim])),))

    def stage_of(self, layer: int) -> int:
        """The stage that holds `layer`."""
        return next(s for s in range(self.num_ranks) if layer < self.boundaries[s + 1])

    def address_of(self, layer: int) -> Address | None:
        """Where the weights are that `layer` computes with (those of the first use of its tie); None if it has none."""
        owner = self.module.owners[layer]
        for stack in self.stacks.values():
            if owner in stack.places:
                return Address(STACKED, stack.name)
        for shared in self.shared.values():
            if owner == shared.layer:
                return Address(SHARED, shared.name)
        return None

    # ------------------------------------------------------------------------------------------------ the params tree

    @property
    def specs(self) -> Params:
        """A PartitionSpec per leaf of the params tree."""

        return {
            STACKED: {name: jax.tree.map(lambda _: P(PIPE), stack.params) for name, stack in self.stacks.items()},
            SHARED: {name: jax.tree.map(lambda p: p.spec, s.placements) for name, s in self.shared.items()},
        }

    def shardings(self, mesh: Mesh) -> Params:
        """A NamedSharding per leaf of the params tree."""
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs, is_leaf=lambda x: isinstance(x, P))

    def shapes(self) -> Params:
        """A ShapeDtypeStruct per leaf of the params tree."""

        def stacked(stack: Stack) -> Params:
            lead = (self.num_ranks, stack.slots)
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, *a.shape), a.dtype), stack.params)

        return {
            STACKED: {name: stacked(stack) for name, stack in self.stacks.items()},
            SHARED: {name: shared.params for name, shared in self.shared.items()},
        }

    # ------------------------------------------------------------------------------------- per-layer view, and back

    def to_layers(self, params: Params) -> list[Params]:
        """Per layer, in order, its own params in the shapes its `init` gave; `{}`-like for layers that hold none."""
        layers: list[Params] = list(self.layer_params)  # right already for layers without leaves
        for layer, own in self.owned(params).items():
            layers[layer] = own
        return layers

    def owned(self, params: Params) -> dict[int, Params]:
        """The params of each layer that owns some, by its index, from a params tree of arrays or of ShapeDtypeStruct."""
        found: dict[int, Params] = {}
        for name, stack in self.stacks.items():
            for layer, place in stack.places.items():
                found[layer] = jax.tree.map(lambda a, at=place: _slot(a, at), params[STACKED][name])
        for name, shared in self.shared.items():
            found[shared.layer] = params[SHARED][name]
        return dict(sorted(found.items()))

    def from_layers(self, mesh: Mesh, layers: Sequence[Params]) -> Params:
        """The params tree on the mesh from per-layer params (see `check_layers`)."""

        def build(layers: list[Params]) -> Params:
            def stacked(stack: Stack) -> Params:
                grid: list[Any] = [None] * (self.num_ranks * stack.slots)
                for layer, (rank, slot) in stack.places.items():
                    grid[rank * stack.slots + slot] = layers[layer]
                blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stack.params)
                lead = (self.num_ranks, stack.slots)
                return jax.tree.map(
                    lambda *leaves: jnp.stack(leaves).reshape(*lead, *leaves[0].shape),
                    *[blank if layer is None else layer for layer in grid],
                )

            return {
                STACKED: {name: stacked(stack) for name, stack in self.stacks.items()},
                SHARED: {name: layers[shared.layer] for name, shared in self.shared.items()},
            }

        if mesh not in self._builders:
            self._builders[mesh] = jax.jit(build, out_shardings=self.shardings(mesh))
        return self._builders[mesh](jax.device_get(list(layers)))


def layer_name(layer: int) -> str:
    """What a layer is called where layers are listed by name: in the tree that an optimizer sees, in checkpoints."""
    return f"layer_{layer:03d}"


def _slot(a: Any, place: tuple[int, int]) -> Any:
    return jax.ShapeDtypeStruct(a.shape[2:], a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a[place]


def address_and_rest(path: KeyPath) -> tuple[Address, KeyPath]:
    """The entry of the params tree that a leaf belongs to, by the path of the leaf, and the path inside of the entry."""
    return Address(path[0].key, path[1].key), path[2:]


def is_stack(path: KeyPath) -> bool:
    """Whether a leaf of the params tree, by its path, holds several layers: [S, slots, ...]."""
    return path[0].key == STACKED


def check_params(layout: Layout, params: Params) -> None:
    """Raises LayerError unless `params` has the structure and the shapes of the params tree of `layout`.

    Two cuts of like layers may have the same shapes; then nothing shows that params belong to the other one.
    """
    wanted = layout.shapes()
    if jax.tree.structure(params) == jax.tree.structure(wanted):
        shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(params)]
        if shapes == [leaf.shape for leaf in jax.tree.leaves(wanted)]:
            return
    try:
        found = describe(params)
    except Exception:  # leaves that are no arrays
        found = repr(params)
    raise LayerError(
        f"params is {found[:500]}, but those of this pipeline are {describe(wanted)[:500]}. Pass what its init or "
        "from_layers returned; params of another number of stages come over by pipe.from_layers(other.to_layers(params))."
    )


def check_layers(module: PipelineModule, layers: Sequence[Params], expected: Sequence[Params]) -> None:
    """Raises LayerError unless `layers` has, per layer, the structure, shapes and dtypes of `expected`."""
    for index, (given, wanted) in enumerate(zip(layers, expected, strict=True)):
        if signature(given) != signature(wanted):
            raise LayerError(f"{module.label(index)}: expected params {describe(wanted)}, got {describe(given)}.")


def _common(names: Sequence[str]) -> str:
    """One name for layers that have their own: `block` for `block_0`, `block_1`; the first one's if they share nothing."""
    if len(set(names)) == 1:
        return names[0]
    return os.path.commonprefix(list(names)).rstrip("0123456789_-.:/ ") or names[0]


def _unique(name: str, taken: dict[str, Any]) -> str:
    if name not in taken:
        return name
    return next(f"{name}_{n}" for n in range(2, len(taken) + 3) if f"{name}_{n}" not in taken)
