"""The two kinds of units, which differ in what a forward keeps for its backward.

`Recompute` keeps the input of the unit and runs it again. `Keep` keeps what the derivative needs, all of it or what a
policy says: `jax.vjp` returns a function that is a pytree, and those of its leaves that are params, keys or inputs of the
unit are known again at the backward and are not kept.

State that layers change has gone on when the backward runs, so what a backward reads of it is kept by both. Few do: a layer
that normalises by the statistics of the micro-batch updates the running ones, and does not look at them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxpipe.executor import flow, passing, seeds
from jaxpipe.executor.pullback import of_trained, vjp
from jaxpipe.executor.unit import Gradients, Unit, run_parts
from jaxpipe.layout.stages import Part
from jaxpipe.model.capture import Source, capture
from jaxpipe.model.context import Aux
from jaxpipe.model.shapes import aval
from jaxpipe.model.values import canonical, split_inexact
from jaxpipe.types import Avals, Leaves, Params, Tree


class Recompute(Unit):
    """Keeps the input, and runs the unit again at the backward."""

    def __init__(self, parts: Sequence[Part], params: Avals, inputs: Avals, contexts: Avals):
        super().__init__(parts, params, inputs, contexts)
        self._forward = capture(lambda p, x, k: run_parts(parts, p, x, k), params, inputs, contexts)
        self.outputs, self.beside = self._forward.outputs
        self.saved, self.saved_inputs = list(self._inputs), list(range(len(self._inputs)))
        structure = jax.tree.structure(inputs)

        def backward(
            params: Params, again: Params, known: Leaves, contexts: Tree, dy: Leaves, extra: jax.Array | None
        ) -> Gradients:
            x = jax.tree.unflatten(structure, known)
            function, param_leaves, x_leaves = self._function(params, x, contexts)
            again_leaves = split_inexact(again)[0]
            made, pullback = vjp(_without_beside(function), param_leaves, x_leaves, again_leaves, self._frozen)
            y, losses = made
            dparams, dx = pullback((flow.cotangents(canonical(y), dy), seeds.of_losses(extra, losses)))
            return dparams, flow.spread(dx, self.takes)

        self._backward = self._captured_backward(
            backward, params, params, self._inputs, contexts, self.wanted, self.seed
        )
        first = 2 * len(jax.tree.leaves(params)) + len(self._inputs)
        self._kept = passing.read(self._backward.jaxpr, first, self._passing)
        leaves = jax.tree.leaves(contexts)
        self.saved += [aval(leaves[number]) for number in self._kept]

    def forward(self, params: Params, x: Tree, contexts: Tree) -> tuple[Tree, list[Aux], Leaves]:
        leaves = jax.tree.leaves(contexts)
        kept = [leaves[number] for number in self._kept]
        return *self._forward(params, x, contexts), [*jax.tree.leaves(x), *kept]

    def operands(self, params: Params, again: Params, known: Leaves, saved: Leaves, contexts: Tree) -> tuple[Tree, ...]:
        return params, again, known, passing.replaced(contexts, self._kept, saved)


class Keep(Unit):
    """Keeps what the derivative needs: everything, or what a `jax.checkpoint` policy says."""

    keeps_results = True

    def __init__(
        self,
        parts: Sequence[Part],
        params: Avals,
        inputs: Avals,
        contexts: Avals,
        *,
        policy: Callable[..., Any] | None = None,
    ):
        super().__init__(parts, params, inputs, contexts)

        def forward(params: Params, x: Tree, contexts: Tree) -> tuple[Tree, list[Aux], Any]:
            function, param_leaves, x_leaves = self._function(params, x, contexts)
            function, trained = of_trained(function, param_leaves, self._frozen)
            if policy is not None:
                # Forward and backward are different branches of the loop: nothing could be merged across them anyway.
                function = jax.checkpoint(function, policy=policy, prevent_cse=False)
            (y, _), pullback, beside = jax.vjp(function, trained, x_leaves, has_aux=True)
            return *canonical((y, beside)), pullback  # jax.checkpoint turns constants into Python scalars

        self._forward = capture(forward, params, inputs, contexts)
        self.outputs, self.beside, pullback = self._forward.outputs
        self._num_outputs = len(jax.tree.leaves((self.outputs, self.beside)))
        sources = self._forward.sources(self._num_outputs)
        # Positions among the leaves of (params, inputs, contexts).
        first = len(jax.tree.leaves(params))
        behind = first + len(self._inputs)
        arguments = {source.argument for source in sources if source.argument is not None}
        self.saved_inputs = sorted(index - first for index in arguments if first <= index < behind)
        known_avals = [self._inputs[i] for i in self.saved_inputs]
        changed = {behind + number for number in self._passing}
        kept: dict[Source, int] = {}  # a value that is kept -> the first leaf of the pullback that is it
        for index, source in enumerate(sources):
            if source.computed is not None or source.argument in changed:
                kept.setdefault(source, index)
        places = {source: place for place, source in enumerate(kept)}
        leaves, structure = jax.tree.flatten(pullback)
        computed_avals = [aval(leaves[index]) for index in kept.values()]
        self._kept = [self._num_outputs + index for index in kept.values()]
        self.saved = known_avals + computed_avals

        losses = seeds.losses_of(self.beside)

        def backward(
            params: Params, known: Leaves, saved: Leaves, contexts: Tree, dy: Leaves, extra: jax.Array | None
        ) -> Gradients:
            arguments = dict(enumerate(jax.tree.leaves(params)))
            arguments |= {first + i: leaf for i, leaf in zip(self.saved_inputs, known, strict=True)}
            arguments |= {behind + i: leaf for i, leaf in enumerate(jax.tree.leaves(contexts))}
            leaves: Leaves = []
            for source in sources:
                if source.computed is not None or source.argument in changed:
                    leaves.append(saved[places[source]])
                else:
                    leaves.append(source.constant if source.argument is None else arguments[source.argument])
            start = flow.cotangents(self.outputs, dy), seeds.of_losses(extra, losses)
            dparams, dx = jax.tree.unflatten(structure, leaves)(start)
            return dparams, flow.spread(dx, self.takes)

        made = known_avals, computed_avals
        self._backward = self._captured_backward(backward, params, *made, contexts, self.wanted, self.seed)

    def forward(self, params: Params, x: Tree, contexts: Tree) -> tuple[Tree, list[Aux], Leaves]:
        made = self._forward.leaves(params, x, contexts)
        y, beside = jax.tree.unflatten(jax.tree.structure((self.outputs, self.beside)), made[: self._num_outputs])
        inputs = jax.tree.leaves(x)
        return y, beside, [inputs[i] for i in self.saved_inputs] + [made[i] for i in self._kept]

    def operands(self, params: Params, again: Params, known: Leaves, saved: Leaves, contexts: Tree) -> tuple[Tree, ...]:
        # What a policy runs again is seldom a product with a weight, so all of it reads the operands of the derivative.
        return again, known, saved, contexts


def _without_beside(function: Callable[..., tuple[Tree, list[Aux]]]) -> Callable[..., Tree]:
    return lambda *args: function(*args)[0]
