"""A unit of rematerialisation, compiled into two functions: forward (y, saved) and backward (dparams, dx).

`jax.vjp` returns a pytree. Its leaves that are params, keys or the unit's input are known again at the backward pass and
need no storage of their own; the rest is what the forward has to save. With full rematerialisation only the input is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxpipe.model.shapes import aval, is_inexact
from jaxpipe.model.stages import Part
from jaxpipe.model.values import canonical
from jaxpipe.types import Leaves, Tree


def split_inexact(tree: Tree) -> tuple[Leaves, Callable[[Sequence[Any]], Tree]]:
    """The leaves that have derivatives, and the function that puts such leaves back into the tree."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def rebuild(values: Sequence[Any]) -> Tree:
        full = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in chosen], rebuild


def cotangents(outputs: Tree, values: Sequence[jax.Array]) -> Tree:
    """A cotangent tree for `outputs` from those of its inexact leaves; integers get JAX's float0."""
    leaves, structure = jax.tree.flatten(outputs)
    given = iter(values)
    full = [next(given) if is_inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    return jax.tree.unflatten(structure, full)


def _traced(value: jax.Array) -> jax.Array:
    """A value that is known while tracing, as one that is not.

    What the unit before returned may be a constant, and the pullback would then be another one than `_capture` saw.
    """
    return value if isinstance(value, Tracer) else jax.lax.optimization_barrier(value)


@dataclass(frozen=True)
class _Leaf:
    """Where a leaf of the pullback comes from at the backward pass: "params", "keys", "inputs", "constant", "saved"."""

    source: str
    index: int
    constant: Any = None


class Unit:
    """Some parts of a stage, one after the other, differentiated as one.

    Args:
      parts: what the unit computes.
      policy: None saves the unit's input only and recomputes the rest; "everything" recomputes nothing; or a
        `jax.checkpoint` policy.
      params, inputs, layer_keys: abstract values of what `forward` will get.
    """

    def __init__(self, parts: Sequence[Part], policy: Any, params: Tree, inputs: Tree, layer_keys: Tree):
        self.parts, self.policy = tuple(parts), policy
        self.params = params
        self._leaves: list[_Leaf] = []
        self._pullback: Any = None
        self.outputs = jax.eval_shape(self.apply, params, inputs, layer_keys)
        self._input_structure = jax.tree.structure(inputs)
        self._input_avals = [aval(leaf) for leaf in jax.tree.leaves(inputs)]
        if policy is None:
            self.saved_inputs = list(range(len(self._input_avals)))
            self.saved: list[jax.ShapeDtypeStruct] = list(self._input_avals)
        else:
            extra = jax.eval_shape(self._capture, params, inputs, layer_keys)
            self.saved_inputs = sorted({leaf.index for leaf in self._leaves if leaf.source == "inputs"})
            self.saved = [self._input_avals[i] for i in self.saved_inputs] + list(extra)

    def apply(self, params: Tree, x: Tree, layer_keys: Tree, train: bool = True) -> Tree:
        """The plain computation; `params` and `layer_keys` have one entry per part."""
        for part, held, key in zip(self.parts, params, layer_keys, strict=True):
            x = part.apply(held, x, key, train)
        return x

    def forward(self, params: Tree, x: Tree, layer_keys: Tree) -> tuple[Tree, Leaves]:
        """The output, and what the backward pass needs of it (shapes as in `saved`)."""
        if self.policy is None:
            return self.apply(params, x, layer_keys), jax.tree.leaves(x)
        x = jax.tree.map(_traced, x)
        inputs = jax.tree.leaves(x)
        y, pullback = self._vjp(params, x, layer_keys)
        leaves = jax.tree.leaves(pullback)
        assert len(leaves) == len(self._leaves), "the layer traced differently twice; is its apply pure?"
        extra: dict[int, Any] = {
            known.index: leaf for known, leaf in zip(self._leaves, leaves, strict=True) if known.source == "saved"
        }
        return y, [inputs[i] for i in self.saved_inputs] + [extra[i] for i in range(len(extra))]

    def backward(
        self, params: Tree, saved: Leaves, layer_keys: Tree, dy: Leaves, inputs: Tree | None = None
    ) -> tuple[Leaves, Leaves]:
        """Gradients of the inexact leaves of the params and of the input, from those of the output.

        Args:
          saved: what `forward` returned; without the inputs if those are given.
          inputs: the unit's input, if it is known without having been saved.
        """
        if inputs is None:
            known = dict(zip(self.saved_inputs, saved, strict=False))
            saved = saved[len(self.saved_inputs) :]
        else:
            known = dict(enumerate(jax.tree.leaves(inputs)))
        if self.policy is None:
            x = jax.tree.unflatten(self._input_structure, [known[i] for i in range(len(known))])
            _, pullback = self._vjp(params, x, layer_keys)
        else:
            sources = {
                "params": jax.tree.leaves(params),
                "keys": jax.tree.leaves(layer_keys),
                "saved": saved,
                "inputs": known,
            }
            leaves = [
                leaf.constant if leaf.source == "constant" else sources[leaf.source][leaf.index]
                for leaf in self._leaves
            ]
            pullback = jax.tree.unflatten(self._pullback, leaves)
        return pullback(cotangents(self.outputs, dy))

    def _vjp(self, params: Tree, x: Tree, layer_keys: Tree) -> tuple[Tree, Any]:
        param_leaves, with_params = split_inexact(params)
        x_leaves, with_x = split_inexact(x)

        def function(param_leaves: Leaves, x_leaves: Leaves) -> Tree:
            return self.apply(with_params(param_leaves), with_x(x_leaves), layer_keys)

        if not isinstance(self.policy, str | None):
            policy: Any = self.policy
            # Forward and backward are different branches of the loop: nothing could be merged across them anyway.
            function = jax.checkpoint(function, policy=policy, prevent_cse=False)
        y, pullback = jax.vjp(function, param_leaves, x_leaves)
        return canonical(y), pullback  # jax.checkpoint turns constants into Python scalars

    def _capture(self, params: Tree, x: Tree, layer_keys: Tree) -> Leaves:
        _, pullback = self._vjp(params, x, layer_keys)
        leaves, self._pullback = jax.tree.flatten(pullback)
        sources = {"params": params, "keys": layer_keys, "inputs": x}
        known = {id(leaf): (name, i) for name, tree in sources.items() for i, leaf in enumerate(jax.tree.leaves(tree))}
        saved: list[Any] = []
        self._leaves = []
        for leaf in leaves:
            if not isinstance(leaf, Tracer):
                self._leaves.append(_Leaf("constant", -1, leaf))
                continue
            if id(leaf) not in known:
                known[id(leaf)] = ("saved", len(saved))
                saved.append(leaf)
            self._leaves.append(_Leaf(*known[id(leaf)]))
        return saved
