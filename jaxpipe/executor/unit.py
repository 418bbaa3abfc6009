"""A unit of rematerialisation: some parts of a stage, captured as a forward and a backward function."""

import abc
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxpipe.errors import LayerError
from jaxpipe.executor import flow, passing, seeds
from jaxpipe.executor.residence import Repeat
from jaxpipe.executor.seeds import Losses
from jaxpipe.executor.trained import frozen_numbers, split_trained
from jaxpipe.layout.stages import Part
from jaxpipe.model.blame import blame
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.shapes import aval, describe, is_inexact
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Leaves, Params, Tree

State = TypeVar("State")
# (those of the trained leaves of the params, those of the inexact leaves of the input)
Gradients = tuple[Leaves, Leaves]


def run_parts(
    parts: Sequence[Part], params: Sequence[Params], x: Tree, contexts: Sequence[Context]
) -> tuple[Tree, list[Aux]]:
    """The parts one after the other, and what each gives beside; `params` and `contexts` have one entry per part."""
    beside: list[Aux] = []
    for part, held, context in zip(parts, params, contexts, strict=True):
        x, aux = part.apply(held, x, context)
        beside.append(aux)
    return x, beside


def repeated(step: Callable[[State, Repeat], State], carry: State, repeats: int) -> State:
    """`carry = step(carry, repeat)` for each repetition, as a scan; a single one is inlined, with a static index."""
    if repeats == 1:
        return step(carry, 0)
    return jax.lax.scan(lambda c, i: (step(c, i), None), carry, jnp.arange(repeats, dtype=jnp.int32))[0]


class Unit(abc.ABC):
    """Some parts of a stage, one after the other, differentiated as one.

    Args:
      parts: what the unit computes.
      params, inputs, contexts: abstract values of what `forward` will get, params and contexts per part.

    Attributes:
      inputs, outputs, contexts: abstract values of what it takes and returns, and of the contexts of its parts.
      beside: those of what its parts give beside, per part.
      saved: abstract values of what the forward keeps: first the inputs in `saved_inputs`, then what is computed.
      saved_inputs: which leaves of the input are among that.
      keeps_results: whether more than inputs may be kept.
      takes, gives: of which inexact leaves of input and output gradients are needed; see `flow`.
    """

    keeps_results = False
    outputs: Avals
    beside: list[Aux]
    saved: list[jax.ShapeDtypeStruct]
    saved_inputs: list[int]
    _backward: Captured

    def __init__(self, parts: Sequence[Part], params: Avals, inputs: Avals, contexts: Avals):
        self.parts, self.params, self.inputs = tuple(parts), params, inputs
        self._inputs = [aval(leaf) for leaf in jax.tree.leaves(inputs)]
        self.contexts = contexts
        self._frozen = frozen_numbers(parts, params)
        self.takes, self.gives = self.parts[0].takes, self.parts[-1].gives
        # Numbers of those leaves of the contexts that will be others when the backward runs.
        self._passing = passing.numbers(parts, contexts)

    @property
    def seed(self) -> Avals:
        """The abstract value of the seed of its extra losses, or None if it has none."""
        return seeds.aval_of(self.beside)

    @abc.abstractmethod
    def forward(self, params: Params, x: Tree, contexts: Tree) -> tuple[Tree, list[Aux], Leaves]:
        """The output, what the parts give beside it, and what is kept for the backward (shapes as in `saved`)."""

    @abc.abstractmethod
    def operands(self, params: Params, again: Params, known: Leaves, saved: Leaves, contexts: Tree) -> tuple[Tree, ...]:
        """What the captured backward takes before the gradients; arguments as for `backward`."""

    def backward(
        self,
        params: Params,
        again: Params,
        known: Leaves,
        saved: Leaves,
        contexts: Tree,
        dy: Leaves,
        extra: jax.Array | None = None,
    ) -> Gradients:
        """Gradients of the trained leaves of the params and of the input, from those of the output (see `flow`).

        Args:
          again: the params once more, for the derivative; `params` is what the forward is run again with.
          known: the leaves of the input that are in `saved_inputs`.
          saved: what else `forward` kept.
          extra: the gradient of the objective by each extra loss; see `seeds`. Not looked at if the unit has none.
        """
        return self._backward(*self.operands(params, again, known, saved, contexts), dy, self.own_seed(extra))

    def own_seed(self, extra: jax.Array | None) -> jax.Array | None:
        """The seed of its extra losses, or None if it has none."""
        return None if self.seed is None or extra is None else extra.astype(self.seed.dtype)

    @property
    def captured(self) -> Captured:
        """The backward: `captured(*operands(...), dy, own_seed(...))`."""
        return self._backward

    @property
    def wanted(self) -> list[jax.ShapeDtypeStruct | None]:
        """Abstract values of the gradients of its output that it is given."""
        return flow.needed(flow.inexact(self.outputs), self.gives)

    @property
    def has_backward(self) -> bool:
        """Whether anything is asked of it: not if nothing in it is trained and no gradient of its input is needed."""
        takes = flow.needed([leaf for leaf in self._inputs if is_inexact(leaf)], self.takes)
        return bool(split_trained(self.parts, self.params)[0] or flow.leaves(takes))

    def _captured_backward(self, backward: Callable[..., Gradients], *args: Avals) -> Captured:
        """The backward, captured; what a user has written in a `custom_vjp` runs here.

        Raises:
          LayerError: the gradient of the input has other shapes or dtypes than the input.
        """
        label = self.parts[0].label
        where = label if len(self.parts) == 1 else f"{label} or a layer behind it"
        with blame(f"the backward of {where}", lambda: f"it was given the gradient of {describe(self.outputs)}"):
            captured = capture(backward, *args)
        wanted = flow.needed([leaf for leaf in self._inputs if is_inexact(leaf)], self.takes)
        found, wanted = flow.leaves(captured.outputs[1]), flow.leaves(wanted)
        if [(a.shape, a.dtype) for a in found] != [(a.shape, a.dtype) for a in wanted]:
            raise LayerError(
                f"The backward of {where} gives {describe(found)} for an input of {describe(wanted)}. The gradient of an "
                "array has its shape and its dtype: cast it in the custom_vjp."
            )
        return captured

    def _function(
        self, params: Params, x: Tree, contexts: Tree
    ) -> tuple[Callable[..., tuple[tuple[Tree, Losses], list[Aux]]], Leaves, Leaves]:
        """The computation as a function of inexact leaves of params and input, and those leaves: all of the params, and of
        the input those whose gradient is needed.

        The function returns (output, extra losses), which have derivatives, and what the parts give beside.
        """
        param_leaves, with_params = split_inexact(params)
        x_leaves, with_x = split_inexact(x)

        def function(param_leaves: Leaves, needed: Leaves) -> tuple[tuple[Tree, Losses], list[Aux]]:
            x = with_x(flow.replaced(x_leaves, needed, self.takes))
            y, beside = run_parts(self.parts, with_params(param_leaves), x, contexts)
            return (y, seeds.losses_of(beside)), beside

        return function, param_leaves, flow.leaves(flow.needed(x_leaves, self.takes))
