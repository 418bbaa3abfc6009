"""One call of a transformation: what its arguments look like in the natural tree, and where their values come from."""

import jax
import jax.extend.core as jex
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxpipe.optimizer.groups import Grouped
from jaxpipe.optimizer.natural import NaturalTree
from jaxpipe.optimizer.run import Stacked, Target, run
from jaxpipe.optimizer.state import OptState, StatePlan
from jaxpipe.optimizer.trace import ArrayKey, Home, Trace
from jaxpipe.types import Avals, Tree


class Call:
    """Collects the arguments of one call of a transformation, and runs its trace on them.

    `argument` and `state` take the arguments in order, and return the shapes to trace the transformation with.

    Attributes:
      homes: for each leaf that was taken so far, its home or None.
    """

    def __init__(self, tree: NaturalTree, mesh: Mesh, plan: StatePlan | None = None):
        self.tree, self.mesh, self.plan = tree, mesh, plan
        self.homes: list[Home | None] = []
        self._values: list[ArrayLike | None] = []
        self._held_in: list[ArrayKey] = []
        self._held: dict[ArrayKey, jax.Array] = {}
        self._number = 0

    def argument(self, tree: Tree) -> Avals:
        """Takes an argument, and returns its shapes, with a natural tree in the place of each params tree."""
        for part in self.tree.split(tree)[0]:
            if not self.tree.is_params(part):
                self._take(None, None, part)
                continue
            self._number += 1
            cells = self.tree.cells(part)
            for place in self.tree.places:
                self._take(place.home, (self._number, place.cell), cells[place.cell])
        return self.tree.natural_shapes(tree)

    def state(self, state: OptState) -> Avals:
        """Takes the stored state of the optimizer, and returns the shapes of the state that optax made."""
        assert self.plan is not None
        self._number += 1
        for leaf in self.plan.leaves:
            array = state.rest[leaf.name] if leaf.stack is None else state.stacked[leaf.stack][leaf.name]
            self._take(leaf.home, (self._number, leaf.stack, leaf.name), array)
        return jax.tree.unflatten(self.plan.structure, [leaf.aval for leaf in self.plan.leaves])

    def _take(self, home: Home | None, key: ArrayKey, value: jax.Array) -> None:
        self.homes.append(home)
        self._held_in.append(key if home else None)
        self._values.append(None if home else value)
        if home:
            self._held[key] = value

    def run(self, closed: jex.ClosedJaxpr, targets: list[Target]) -> tuple[Stacked, list[ArrayLike]]:
        """Runs the trace of the call on the arguments that were taken; see `run.run` for `targets` and the results."""
        trace = Trace(closed, self.homes, self._held_in, [target and target[:2] for target in targets])
        return run(Grouped(trace), self.tree.layout, self.mesh, self._values, self._held, targets)
