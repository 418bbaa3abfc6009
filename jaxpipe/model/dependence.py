"""Which values between layers depend on weights, so that the loss has a gradient by them that somebody needs.

A float that is made of inputs alone, such as an attention mask that the first layer makes and every block reads, has a
derivative, but no weight is behind it: its gradient need not be computed, nor sent to the stage before. Read off the traces
of the layers.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from jaxpipe.model.jaxprs import CALLS, bodies, opened
from jaxpipe.model.shapes import is_inexact
from jaxpipe.model.tracing import LayerShapes

# Calls whose derivatives are those of their body. The rules of a `custom_jvp` or `custom_vjp` may say anything: a step
# function with a surrogate gradient, whose body compares and so leads nowhere. So these are none of them.
_BODIES = frozenset(name for name in CALLS if not name.startswith("custom_"))


def sources(jaxpr: Any) -> list[frozenset[int]]:
    """For each result of a jaxpr, the arguments that a derivative of it can lead to, by number.

    Args:
      jaxpr: open or closed. What it does not say is taken to depend on everything.
    """
    inner: Any = opened(jaxpr)
    found: dict[Any, frozenset[int]] = {v: frozenset([i]) for i, v in enumerate(inner.invars) if is_inexact(v.aval)}

    def of(v: Any) -> frozenset[int]:
        return frozenset() if isinstance(v, jex.Literal) else found.get(v, frozenset())

    for eqn in inner.eqns:
        arguments = [of(v) for v in eqn.invars]
        everything = frozenset[int]().union(*arguments)
        within = sources(*bodies(eqn)) if eqn.primitive.name in _BODIES else None
        for number, v in enumerate(eqn.outvars):
            if is_inexact(v.aval):  # nothing leads through integers
                each = everything
                if within is not None:
                    each = frozenset[int]().union(*(arguments[i] for i in within[number]))
                found[v] = each
    return [of(v) for v in inner.outvars]


def behind_weights(
    shapes: Sequence[LayerShapes],
    owners: Sequence[int],
    frozen: Callable[[int], Collection[int]] = lambda layer: (),
) -> list[tuple[bool, ...]]:
    """For the input of each layer and the output of the last one: of each inexact leaf, whether it depends on a weight.

    Args:
      shapes: of the layers, with traces.
      owners: for each layer the one whose weights it uses.
      frozen: for a layer, the numbers of the leaves of its weights by which no gradient is wanted.
    """
    leaves = jax.tree.leaves(shapes[0].inputs)
    depends = [False] * len(leaves)
    found = [_of_inexact(leaves, depends)]
    for index, shape in enumerate(shapes):
        weights, taken, given = (
            jax.tree.leaves(tree) for tree in (shapes[owners[index]].computed, shape.inputs, shape.outputs)
        )
        fixed = frozen(index)
        reached = {i for i, each in enumerate([*(i not in fixed for i in range(len(weights))), *depends]) if each}
        assert shape.run is not None and len(depends) == len(taken), "the layers were traced on a mesh"
        depends = [bool(each & reached) for each in sources(shape.run.jaxpr)[: len(given)]]
        found.append(_of_inexact(given, depends))
    return found


def _of_inexact(leaves: Sequence[Any], flags: Sequence[bool]) -> tuple[bool, ...]:
    return tuple(flag for leaf, flag in zip(leaves, flags, strict=True) if is_inexact(leaf))
