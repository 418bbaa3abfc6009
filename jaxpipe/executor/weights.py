"""What a rank computes with: each group of the params tree in its residence. Nothing above knows which one a layer has."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.executor import reduce
from jaxpipe.executor.everywhere import Everywhere
from jaxpipe.executor.residence import Repeat, Residence
from jaxpipe.executor.stacked import Stacked
from jaxpipe.executor.unit import split_inexact
from jaxpipe.mesh import DATA
from jaxpipe.model.layout import SHARED, STACKED, Layout
from jaxpipe.model.shapes import sum_dtype
from jaxpipe.model.stages import Part
from jaxpipe.types import Avals, Leaves, Params, Tree


class Weights:
    """What a rank holds while a step runs, in the structure of the params tree.

    Args:
      layout: of the params tree.
      mesh: the devices.
    """

    def __init__(self, layout: Layout, mesh: Mesh):
        self.layout, self.mesh = layout, mesh
        self._residences: dict[str, Residence[Any]] = {
            STACKED: Stacked(layout.stacks, mesh),
            SHARED: Everywhere(layout.shared, mesh),
        }

    def avals(self) -> Avals:
        """Abstract values of what a rank holds."""
        return {
            group: {name: residence.avals(entry) for name, entry in residence.entries.items()}
            for group, residence in self._residences.items()
        }

    def enter(self, stored: Params) -> Params:
        """What a rank holds, from its part of the params tree; inside `shard_map`."""
        return {
            group: {name: residence.enter(entry, stored[group][name]) for name, entry in residence.entries.items()}
            for group, residence in self._residences.items()
        }

    def take(self, held: Params, parts: Sequence[Part], repeat: Repeat) -> list[Params]:
        """Per part, the params that its repetition `repeat` computes with."""

        def one(part: Part) -> Params:
            if part.address is None:
                return {}
            group, name = part.address
            return self._residences[group].take(held[group][name], part, repeat)

        return [one(part) for part in parts]

    def blank_gradients(self, held: Params) -> Params:
        """Zeros to add gradients to, of dtypes in which many can be summed."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, sum_dtype(a.dtype)), held)

    def add(self, sums: Params, parts: Sequence[Part], repeat: Repeat, taken: Tree, gradients: Leaves) -> Params:
        """`sums` with the gradients of one repetition of some parts added, in place as XLA sees it.

        Args:
          taken: what `take` gave, or its shapes.
          gradients: those of the inexact leaves of it, in order.
        """
        sums = {group: dict(entries) for group, entries in sums.items()}
        remaining = list(gradients)
        for part, params in zip(parts, taken, strict=True):
            count = len(split_inexact(params)[0])
            mine, remaining = remaining[:count], remaining[count:]
            if part.address is None:
                continue
            group, name = part.address
            old, rebuild = split_inexact(sums[group][name])
            add = self._residences[group].add
            sums[group][name] = rebuild([add(s, part, repeat, g) for s, g in zip(old, mine, strict=True)])
        return sums

    def leave(self, sums: Params, counted: jax.Array | None = None) -> Params:
        """The gradient of the params tree from those of what the ranks hold: summed over data ranks, and over ranks too
        where several hold the same weights. The transpose of `enter`, inside `shard_map`.

        Args:
          counted: if false, all gradients are zeros, whatever they were (zero times infinity, say); None: as they are.
        """
        stored = {
            group: {name: residence.leave(entry, sums[group][name]) for name, entry in residence.entries.items()}
            for group, residence in self._residences.items()
        }
        leaves, rebuild = split_inexact(stored)
        leaves = reduce.total(leaves, self.mesh, DATA)
        if counted is not None:
            leaves = [jnp.where(counted, leaf, jnp.zeros_like(leaf)) for leaf in leaves]
        return jax.tree.map(lambda g, a: g.astype(a.dtype), rebuild(leaves), self.layout.shapes())
