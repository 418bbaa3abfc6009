"""A unit of rematerialisation: some parts of a stage, captured as a forward and a backward function.

What a forward keeps for its backward is decided here. `Recompute` keeps the input of the unit and runs it again.
`Keep` keeps what the derivative needs, all of it or what a policy says: `jax.vjp` returns a function that is a pytree,
and those of its leaves that are params, keys or inputs of the unit are known again at the backward and are not kept.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.errors import LayerError
from jaxpipe.executor.residence import Repeat
from jaxpipe.model.blame import blame
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.shapes import aval, describe, is_inexact
from jaxpipe.model.stages import Part
from jaxpipe.model.values import canonical
from jaxpipe.types import Avals, Key, Leaves, Params, Tree

State = TypeVar("State")
# (those of the inexact leaves of the params, those of the inexact leaves of the input)
Gradients = tuple[Leaves, Leaves]


def split_inexact(tree: Tree) -> tuple[Leaves, Callable[[Leaves], Tree]]:
    """The leaves that have derivatives, and the function that puts such leaves back into the tree."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def rebuild(values: Leaves) -> Tree:
        full = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in chosen], rebuild


def run_parts(parts: Sequence[Part], params: Sequence[Params], x: Tree, layer_keys: Sequence[Key | None]) -> Tree:
    """The parts one after the other; `params` and `layer_keys` have one entry per part."""
    for part, held, key in zip(parts, params, layer_keys, strict=True):
        x = part.apply(held, x, key)
    return x


def repeated(step: Callable[[State, Repeat], State], carry: State, repeats: int) -> State:
    """`carry = step(carry, repeat)` for each repetition, as a scan; a single one is inlined, with a static index."""
    if repeats == 1:
        return step(carry, 0)
    return jax.lax.scan(lambda c, i: (step(c, i), None), carry, jnp.arange(repeats, dtype=jnp.int32))[0]


class Unit(abc.ABC):
    """Some parts of a stage, one after the other, differentiated as one.

    Args:
      parts: what the unit computes.
      params, inputs, layer_keys: abstract values of what `forward` will get, params and keys per part.

    Attributes:
      outputs: abstract values of what it returns.
      saved: abstract values of what the forward keeps: first the inputs in `saved_inputs`, then what is computed.
      saved_inputs: which leaves of the input are among that.
    """

    outputs: Avals
    saved: list[jax.ShapeDtypeStruct]
    saved_inputs: list[int]

    def __init__(self, parts: Sequence[Part], params: Avals, inputs: Avals, layer_keys: Avals):
        self.parts, self.params = tuple(parts), params
        self._inputs = [aval(leaf) for leaf in jax.tree.leaves(inputs)]

    @abc.abstractmethod
    def forward(self, params: Params, x: Tree, layer_keys: Tree) -> tuple[Tree, Leaves]:
        """The output, and what is kept of it for the backward (shapes as in `saved`)."""

    @abc.abstractmethod
    def backward(self, params: Params, known: Leaves, saved: Leaves, layer_keys: Tree, dy: Leaves) -> Gradients:
        """Gradients of the inexact leaves of the params and of the input, from those of the output.

        Args:
          known: the leaves of the input that are in `saved_inputs`.
          saved: what else `forward` kept.
        """

    def _captured_backward(self, backward: Callable[..., Gradients], *args: Avals) -> Captured:
        """The backward, captured; what a user has written in a `custom_vjp` runs here.

        Raises:
          LayerError: the gradient of the input has other shapes or dtypes than the input.
        """
        label = self.parts[0].label
        where = label if len(self.parts) == 1 else f"{label} or a layer behind it"
        with blame(f"the backward of {where}", lambda: f"it was given the gradient of {describe(self.outputs)}"):
            captured = capture(backward, *args)
        found, wanted = captured.outputs[1], [leaf for leaf in self._inputs if is_inexact(leaf)]
        if [(a.shape, a.dtype) for a in found] != [(a.shape, a.dtype) for a in wanted]:
            raise LayerError(
                f"The backward of {where} gives {describe(found)} for an input of {describe(wanted)}. The gradient of an "
                "array has its shape and its dtype: cast it in the custom_vjp."
            )
        return captured

    def _function(self, params: Params, x: Tree, layer_keys: Tree) -> tuple[Callable[..., Tree], Leaves, Leaves]:
        """The computation as a function of the inexact leaves of params and input, and those leaves."""
        param_leaves, with_params = split_inexact(params)
        x_leaves, with_x = split_inexact(x)

        def function(param_leaves: Leaves, x_leaves: Leaves) -> Tree:
            return run_parts(self.parts, with_params(param_leaves), with_x(x_leaves), layer_keys)

        return function, param_leaves, x_leaves


class Recompute(Unit):
    """Keeps the input, and runs the unit again at the backward."""

    def __init__(self, parts: Sequence[Part], params: Avals, inputs: Avals, layer_keys: Avals):
        super().__init__(parts, params, inputs, layer_keys)
        self._forward = capture(lambda p, x, k: run_parts(parts, p, x, k), params, inputs, layer_keys)
        self.outputs = self._forward.outputs
        self.saved, self.saved_inputs = list(self._inputs), list(range(len(self._inputs)))
        structure = jax.tree.structure(inputs)

        def backward(params: Params, known: Leaves, layer_keys: Tree, dy: Leaves) -> Gradients:
            function, *leaves = self._function(params, jax.tree.unflatten(structure, known), layer_keys)
            y, pullback = jax.vjp(function, *leaves)
            return pullback(_cotangents(canonical(y), dy))

        self._backward = self._captured_backward(backward, params, self._inputs, layer_keys, _inexact(self.outputs))

    def forward(self, params: Params, x: Tree, layer_keys: Tree) -> tuple[Tree, Leaves]:
        return self._forward(params, x, layer_keys), jax.tree.leaves(x)

    def backward(self, params: Params, known: Leaves, saved: Leaves, layer_keys: Tree, dy: Leaves) -> Gradients:
        return self._backward(params, known, layer_keys, dy)


class Keep(Unit):
    """Keeps what the derivative needs: everything, or what a `jax.checkpoint` policy says."""

    def __init__(
        self,
        parts: Sequence[Part],
        params: Avals,
        inputs: Avals,
        layer_keys: Avals,
        *,
        policy: Callable[..., Any] | None = None,
    ):
        super().__init__(parts, params, inputs, layer_keys)

        def forward(params: Params, x: Tree, layer_keys: Tree) -> tuple[Tree, Any]:
            function, *leaves = self._function(params, x, layer_keys)
            if policy is not None:
                # Forward and backward are different branches of the loop: nothing could be merged across them anyway.
                function = jax.checkpoint(function, policy=policy, prevent_cse=False)
            y, pullback = jax.vjp(function, *leaves)
            return canonical(y), pullback  # jax.checkpoint turns constants into Python scalars

        self._forward = capture(forward, params, inputs, layer_keys)
        self.outputs, pullback = self._forward.outputs
        self._num_outputs = len(jax.tree.leaves(self.outputs))
        sources = self._forward.sources(self._num_outputs)
        # Positions among the leaves of (params, inputs, keys).
        first = len(jax.tree.leaves(params))
        behind = first + len(self._inputs)
        arguments = {source.argument for source in sources if source.argument is not None}
        self.saved_inputs = sorted(index - first for index in arguments if first <= index < behind)
        known_avals = [self._inputs[i] for i in self.saved_inputs]
        computed: dict[int, int] = {}  # number of a computed value -> the first leaf of the pullback that is it
        for index, source in enumerate(sources):
            if source.computed is not None:
                computed.setdefault(source.computed, index)
        leaves, structure = jax.tree.flatten(pullback)
        extra = [aval(leaves[index]) for index in computed.values()]
        self._kept = [self._num_outputs + index for index in computed.values()]
        self.saved = known_avals + extra

        def backward(params: Params, known: Leaves, saved: Leaves, layer_keys: Tree, dy: Leaves) -> Gradients:
            arguments = dict(enumerate(jax.tree.leaves(params)))
            arguments |= {first + i: leaf for i, leaf in zip(self.saved_inputs, known, strict=True)}
            arguments |= {behind + i: leaf for i, leaf in enumerate(jax.tree.leaves(layer_keys))}
            leaves: Leaves = []
            for source in sources:
                if source.argument is not None:
                    leaves.append(arguments[source.argument])
                else:
                    leaves.append(source.constant if source.computed is None else saved[source.computed])
            return jax.tree.unflatten(structure, leaves)(_cotangents(self.outputs, dy))

        self._backward = self._captured_backward(
            backward, params, known_avals, extra, layer_keys, _inexact(self.outputs)
        )

    def forward(self, params: Params, x: Tree, layer_keys: Tree) -> tuple[Tree, Leaves]:
        made = self._forward.leaves(params, x, layer_keys)
        y = jax.tree.unflatten(jax.tree.structure(self.outputs), made[: self._num_outputs])
        inputs = jax.tree.leaves(x)
        return y, [inputs[i] for i in self.saved_inputs] + [made[i] for i in self._kept]

    def backward(self, params: Params, known: Leaves, saved: Leaves, layer_keys: Tree, dy: Leaves) -> Gradients:
        return self._backward(params, known, saved, layer_keys, dy)


def _inexact(outputs: Avals) -> list[jax.ShapeDtypeStruct]:
    return [aval(leaf) for leaf in split_inexact(outputs)[0]]


def _cotangents(outputs: Tree, values: Sequence[jax.Array]) -> Tree:
    """A cotangent tree for `outputs` from those of its inexact leaves; integers get JAX's float0."""
    leaves, structure = jax.tree.flatten(outputs)
    given = iter(values)
    full = [next(given) if is_inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    return jax.tree.unflatten(structure, full)
