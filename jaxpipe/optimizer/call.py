"""One call of a transformation: what its arguments are in the natural tree, and where their values come from."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.optimizer.groups import Grouped
from jaxpipe.optimizer.natural import NaturalTree
from jaxpipe.optimizer.run import run
from jaxpipe.optimizer.state import OptState, StatePlan
from jaxpipe.optimizer.trace import Home, Trace
from jaxpipe.types import Tree


class Call:
    """One call of the transformation: where the values of its arguments come from.

    `argument` and `state` take the arguments in order and return what to trace with.
    """

    def __init__(self, tree: NaturalTree, mesh: Mesh, plan: StatePlan | None = None):
        self.tree, self.mesh, self.plan = tree, mesh, plan
        self.homes: list[Home | None] = []
        self._values: list[Any] = []
        self._batches: list[Any] = []
        self._held: dict[Any, jax.Array] = {}
        self._number = 0

    def argument(self, tree: Tree) -> Tree:
        """An argument in which each params tree becomes a natural one."""
        for part in self.tree.split(tree)[0]:
            if not self.tree.is_params(part):
                self._take(None, None, part)
                continue
            self._number += 1
            cells = self.tree.cells(part)
            for place in self.tree.places:
                self._take(place.home, (self._number, place.cell), cells[place.cell])
        return self.tree.natural_shapes(tree)

    def state(self, state: OptState) -> Tree:
        """The state of the optimizer."""
        assert self.plan is not None
        self._number += 1
        for leaf in self.plan.leaves:
            array = state.rest[leaf.name] if leaf.stack is None else state.stacked[leaf.stack][leaf.name]
            self._take(leaf.home, (self._number, leaf.stack, leaf.name), array)
        return jax.tree.unflatten(self.plan.structure, [leaf.aval for leaf in self.plan.leaves])

    def _take(self, home: Home | None, batch: Any, value: Any) -> None:
        self.homes.append(home)
        self._batches.append(batch if home else None)
        self._values.append(None if home else value)
        if home:
            self._held[batch] = value

    def run(self, closed: Any, targets: list[Any]) -> tuple[dict[Any, Any], list[Any]]:
        """Runs the trace of the call."""
        trace = Trace(closed, self.homes, self._batches, [target and target[:2] for target in targets])
        return run(Grouped(trace), self.tree.layout, self.mesh, self._values, self._held, targets)
