"""What layers cost, in floating-point operations as XLA counts them before it optimizes.

Two counts are needed: that of a forward, which an evaluation pays, and that of a training step, which is the forward op and
the backward op together. In the latter a layer whose values are not kept is computed twice. The trailing layers that belong
to no stack, usually a norm and the head, are computed once whatever is kept, because they run in the backward op alone, and
the first layer needs no gradient of its input.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp

from jaxpipe.model.abstract import with_data_axis
from jaxpipe.model.blame import blame
from jaxpipe.model.context import Context
from jaxpipe.model.layers import BoundLayer
from jaxpipe.model.shapes import avals, describe, is_inexact, signature
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Leaves, Tree

# Makes of a function the one that keeps no more than a rematerialisation mode does, as `jax.checkpoint` does.
Recomputing: TypeAlias = Callable[[Callable[..., Tree]], Callable[..., Tree]]


class Model(Protocol):
    """What is needed of a `PipelineModule`."""

    layers: tuple[BoundLayer, ...]
    owners: tuple[int, ...]

    def label(self, index: int) -> str: ...

    def alone(self, trace: Callable[[], jax.stages.Lowered]) -> jax.stages.Lowered: ...


class Shapes(Protocol):
    """What is needed of `LayerShapes`."""

    @property
    def computed(self) -> Avals: ...
    @property
    def inputs(self) -> Avals: ...
    @property
    def state(self) -> Avals: ...


def recompute(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """The function with nothing kept but its arguments."""
    return jax.checkpoint(function, prevent_cse=False)


class Costs:
    """Counts the layers of a model, like ones once.

    Args:
      model: the module.
    """

    def __init__(self, model: Model):
        self.model = model
        self._counted: dict[Hashable, int] = {}

    def forward(self, shapes: Sequence[Shapes]) -> list[int]:
        """The FLOPs of the forward of each layer."""

        return [self._count(index, shapes, "forward", _forward) for index in range(len(shapes))]

    def training(
        self,
        shapes: Sequence[Shapes],
        recomputing: Recomputing = recompute,
        frozen: Callable[[int], Collection[int]] = lambda layer: (),
    ) -> list[int]:
        """The FLOPs of the forward op and the backward op of each layer.

        Args:
          recomputing: what the rematerialisation mode does to the function of a layer.
          frozen: for each layer the numbers of those leaves of the params it computes with that are frozen. Where nothing
            in a layer and before it is trained, there is no backward.
        """
        tail = len(shapes) - self.tail_length(shapes)

        def both(
            layer: BoundLayer, first: bool, remade: Recomputing | None, but: frozenset[int]
        ) -> Callable[..., Tree]:
            def training(params: Tree, x: Tree, state: Tree) -> Tree:
                def outputs(params: Tree, x: Tree) -> Leaves:
                    y, _ = layer.apply(params, x, Context(None, state), True)
                    return [leaf for leaf in jax.tree.leaves(y) if is_inexact(leaf)]

                function = outputs if remade is None else remade(outputs)
                leaves, rebuild = split_inexact(params if first else (params, x), but)

                def of_leaves(values: Leaves) -> Leaves:
                    return function(rebuild(values), x) if first else function(*rebuild(values))

                y, pullback = jax.vjp(of_leaves, leaves)
                return y, pullback([jnp.ones_like(leaf) for leaf in y])

            return training

        def trains(index: int) -> bool:
            leaves, but = jax.tree.leaves(shapes[self.model.owners[index]].computed), frozen(index)
            return any(is_inexact(leaf) and number not in but for number, leaf in enumerate(leaves))

        start = next((index for index in range(len(shapes)) if trains(index)), 0)

        def one(index: int) -> int:
            first, remade, but = index <= start, recomputing if index < tail else None, frozenset(frozen(index))
            if index < start:
                return self._count(index, shapes, "forward", _forward)
            name = f"training {first} {remade is None} {sorted(but)}", recomputing
            try:
                return self._count(index, shapes, name, lambda layer: both(layer, first, remade, but))
            except Exception:
                # A backward that does not work is reported where the step is planned, which knows more about it.
                return 3 * self._count(index, shapes, "forward", _forward)

        return [one(index) for index in range(len(shapes))]

    def tail_length(self, shapes: Sequence[Shapes]) -> int:
        """How many layers at the end are no part of a stack: tied, without weights, or the only ones of their kind."""
        layers, owners = self.model.layers, self.model.owners
        kinds = [
            (layer.kind, signature(held.computed)) if layer.tie is None and jax.tree.leaves(held.computed) else None
            for layer, held in zip(layers, shapes, strict=True)
        ]
        length = 0
        while length < len(owners) and (kinds[-1 - length] is None or kinds.count(kinds[-1 - length]) == 1):
            length += 1
        return length

    def _count(
        self, index: int, shapes: Sequence[Shapes], what: Hashable, make: Callable[[BoundLayer], Callable[..., Tree]]
    ) -> int:
        layer, inputs = self.model.layers[index], shapes[index].inputs
        held, state = shapes[self.model.owners[index]].computed, shapes[self.model.owners[index]].state
        seen = (what, layer.kind, str(avals((held, inputs, state))))
        if seen not in self._counted:
            source = f"{self.model.label(index - 1)} returns" if index else "the example inputs are"
            with blame(self.model.label(index), lambda: f"{source} {describe(inputs)}"):
                run = with_data_axis(make(layer), 1)
                lowered = self.model.alone(lambda: jax.jit(run).lower(held, inputs, state))
            # XLA counts -1 for what it does not know, such as callbacks, and for the backward of some paddings.
            self._counted[seen] = max(int((lowered.cost_analysis() or {}).get("flops", 0)), 0)
        return self._counted[seen]


def _forward(layer: BoundLayer) -> Callable[..., Tree]:
    return lambda params, x, state: layer.apply(params, x, Context(None, state), True)[0]
