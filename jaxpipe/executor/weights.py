"""What a rank computes with: each group of the params tree in its residence. Nothing above knows which one a layer has."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.executor import data_cut, reduce
from jaxpipe.executor.everywhere import Everywhere
from jaxpipe.executor.further_cuts import FurtherCuts
from jaxpipe.executor.owned import Owned
from jaxpipe.executor.residence import Repeat, Residence
from jaxpipe.executor.stacked import Stacked
from jaxpipe.layout.entries import Shared
from jaxpipe.layout.layout import SHARED, STACKED, Address, Layout
from jaxpipe.layout.on_mesh import left_to_the_compiler
from jaxpipe.layout.stages import Part
from jaxpipe.mesh import DATA
from jaxpipe.model.shapes import sum_dtype
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Params, Tree

# What a rank holds of its own, beside what it holds of the two groups of the params tree.
OWNED = "owned"


class Weights:
    """What a rank holds while a step runs, in the dtypes that a step computes with: a tree per residence.

    Args:
      layout: of the params tree.
      mesh: the devices.
      everywhere: layers whose weights all ranks need, though one stage uses them.
    """

    def __init__(self, layout: Layout, mesh: Mesh, everywhere: Collection[Address] = ()):
        self.layout, self.mesh = layout, mesh
        stacks = {n: replace(s, params=self._computed(min(s.places))) for n, s in layout.stacks.items()}
        single = {n: replace(s, params=self._computed(s.layer)) for n, s in layout.shared.items()}
        piled = {name for pile in layout.piles.values() for name in pile.stored_as.values()}
        owners = {
            name: min(layout.users(shared.layer))
            for name, shared in single.items()
            if name not in piled and Address(SHARED, name) not in everywhere and why_everywhere(layout, shared) is None
        }
        owned = {name: shared for name, shared in single.items() if name in piled or name in owners}
        of_stacks = {name: layout.frozen.of(min(stack.places)) for name, stack in stacks.items()}
        frozen = {name: layout.frozen.of(shared.layer) for name, shared in single.items()}
        others = {name: shared for name, shared in single.items() if name not in owned}
        self._residences: dict[str, Residence[Any]] = {
            STACKED: Stacked(stacks, mesh, of_stacks),
            SHARED: Everywhere(others, mesh, frozen),
        }
        self._owned = Owned(owned, mesh, owners, layout.piles, frozen) if owned else None
        if self._owned is not None:
            self._residences[OWNED] = self._owned
        # The dtypes in the structure of the params tree; the shapes are those of one layer.
        self._computed_with: Avals = {
            STACKED: {name: entry.params for name, entry in stacks.items()},
            SHARED: {name: entry.params for name, entry in single.items()},
        }
        held = self.avals()  # in the order of its leaves
        placements = [p for key in sorted(held) for p in self._residences[key].placements()]
        self._further = FurtherCuts(layout, mesh, placements)

    def _computed(self, layer: int) -> Avals:
        return self.layout.computed_params[layer]

    def _key(self, address: Address) -> str:
        """The residence of what a part names by an address."""
        return OWNED if self._owned is not None and self._owned.has(address) else address.group

    @property
    def everywhere(self) -> Collection[str]:
        """The layers, by the names of their entries, whose weights all ranks hold."""
        return self._residences[SHARED].entries

    def avals(self) -> Avals:
        """Abstract values of what a rank holds."""
        return {key: residence.avals() for key, residence in self._residences.items()}

    def bytes_on_a_device(self, held: Avals) -> int:
        """The bytes that a device has of what a rank holds, or of gradients of it, which is cut over further axes only."""
        return self._further.bytes_on_a_device(held)

    def enter(self, stored: Params, rank: jax.Array) -> Tree:
        """What a rank holds, from its part of the params tree; inside `shard_map`.

        It is cast first, once for the whole step, so that what is gathered is short.

        Args:
          rank: int32 [].
        """
        stored = jax.tree.map(lambda a, like: a.astype(like.dtype), stored, self._computed_with)
        if self.layout.cuts_data:
            leaves, structure = jax.tree.flatten(stored)
            placements = jax.tree.leaves(self.layout.placements)
            stored = jax.tree.unflatten(structure, data_cut.gathered(leaves, placements, self.mesh))
        held = {}
        for key, residence in self._residences.items():
            group = SHARED if key == OWNED else key
            held[key] = residence.enter({name: stored[group][name] for name in residence.entries}, rank)
        return self._further.held(held)

    def take(self, held: Params, parts: Sequence[Part], repeat: Repeat) -> list[Params]:
        """Per part, the params that its repetition `repeat` computes with."""

        def one(part: Part) -> Params:
            if part.address is None:
                return {}
            key = self._key(part.address)
            return self._residences[key].take(held[key], part, repeat)

        return [one(part) for part in parts]

    def blank_gradients(self, held: Params) -> Params:
        """Zeros to add gradients to, of dtypes in which many can be summed; None for what is frozen."""
        trained = {key: residence.trained(held[key]) for key, residence in self._residences.items()}
        return self._further.held(jax.tree.map(lambda a: jnp.zeros(a.shape, sum_dtype(a.dtype)), trained))

    def add(
        self, sums: Params, parts: Sequence[Part], repeat: Repeat, taken: Tree, gradients: Sequence[jax.Array | None]
    ) -> Params:
        """`sums` with the gradients of one repetition of some parts added, in place as XLA sees it.

        Args:
          taken: what `take` gave, or its shapes.
          gradients: those of the trained leaves of it, in order; None adds nothing.
        """
        sums = dict(sums)
        remaining = list(gradients)
        for part, params in zip(parts, taken, strict=True):
            count = len(split_inexact(params, part.frozen)[0])
            mine, remaining = remaining[:count], remaining[count:]
            if part.address is None:
                continue
            key = self._key(part.address)
            sums[key] = self._residences[key].add(sums[key], part, repeat, mine)
        return sums

    def leave(
        self, sums: Tree, rank: jax.Array, counted: jax.Array | None = None, scale: jax.Array | None = None
    ) -> Params:
        """The gradient of the params tree from those of what the ranks hold: summed over data ranks, and over ranks too
        where several hold the same weights. The transpose of `enter`, inside `shard_map`, in the dtypes of the params tree.

        Args:
          rank: int32 [].
          counted: if false, all gradients are zeros, whatever they were (zero times infinity, say); None: as they are.
          scale: that of the loss, by which the gradients are divided while they are still long; None: they are not.
        """
        stored: Params = {STACKED: {}, SHARED: {}}
        for key, residence in self._residences.items():
            stored[SHARED if key == OWNED else key] |= residence.leave(sums[key], rank)
        if self.layout.cuts_data:
            leaves, structure = jax.tree.flatten(stored)
            placements = jax.tree.leaves(self.layout.trained(self.layout.placements))
            stored = jax.tree.unflatten(structure, data_cut.scattered(leaves, placements, self.mesh))
        leaves, rebuild = split_inexact(stored)
        if not self.layout.cuts_data:
            leaves = reduce.total(leaves, self.mesh, DATA)
        if scale is not None:
            leaves = [leaf / scale.astype(leaf.dtype) for leaf in leaves]
        if counted is not None:
            leaves = [jnp.where(counted, leaf, jnp.zeros_like(leaf)) for leaf in leaves]
        stored = jax.tree.map(
            lambda g, a: g.astype(a.dtype), rebuild(leaves), self.layout.trained(self.layout.shapes())
        )
        return self._further.stored(stored)


def why_everywhere(layout: Layout, shared: Shared) -> str | None:
    """Why the weights of a layer that is stored on its own lie whole on all ranks during a step; None: they do not."""
    if layout.num_ranks == 1:
        return "there is one rank"
    if len(users := layout.users(shared.layer)) > 1:
        return f"tied: ranks {' '.join(map(str, sorted(users)))} use it"
    if any(left_to_the_compiler(placement).cuts for placement in jax.tree.leaves(shared.placements)):
        return "a further axis cuts it"
    return None
