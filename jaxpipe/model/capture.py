"""A function of arrays, traced once: the compiled loop runs the jaxpr, not the user's Python again.

What is captured cannot come out differently where it is used a second time, so the forward and the backward of a unit
always agree about what is saved. A jaxpr also tells where each of its results comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxpipe.model.shapes import avals
from jaxpipe.types import Avals, Leaves, Tree


@dataclass(frozen=True)
class Source:
    """Where a result of a captured function comes from: one of these, the others are None.

    Attributes:
      argument: index among the leaves of all arguments, if the result is that argument as it is.
      computed: number of the value among the distinct ones that are computed.
      constant: the value, if it depends on no argument.
    """

    argument: int | None = None
    computed: int | None = None
    constant: Any = None


class Captured:
    """Calls like the function it was captured from.

    Args:
      jaxpr, outputs: what `jax.make_jaxpr(function, return_shape=True)` gives.

    Attributes:
      jaxpr: the trace.
      outputs: abstract values of the results.
    """

    def __init__(self, jaxpr: jex.ClosedJaxpr, outputs: Avals):
        self.jaxpr, self.outputs = jaxpr, avals(outputs)
        self._run = jex.jaxpr_as_fun(jaxpr)
        self._structure = jax.tree.structure(outputs)

    def __call__(self, *args: Tree) -> Tree:
        return jax.tree.unflatten(self._structure, self.leaves(*args))

    def leaves(self, *args: Tree) -> Leaves:
        """The results, flat."""
        # A result that is a literal of the jaxpr comes out as a number of Python or NumPy.
        made = zip(self._run(*jax.tree.leaves(args)), jax.tree.leaves(self.outputs), strict=True)
        return [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf, aval.dtype) for leaf, aval in made]

    def sources(self, start: int) -> list[Source]:
        """Where the results, flat, come from, those from number `start` on."""
        inner = self.jaxpr.jaxpr
        known: dict[Any, Source] = {
            v: Source(constant=value) for v, value in zip(inner.constvars, self.jaxpr.consts, strict=True)
        }
        known |= {v: Source(argument=index) for index, v in enumerate(inner.invars)}
        found: list[Source] = []
        count = 0
        for v in inner.outvars[start:]:
            if isinstance(v, jex.Literal):
                found.append(Source(constant=v.val))
                continue
            if v not in known:
                known[v] = Source(computed=count)
                count += 1
            found.append(known[v])
        return found


def capture(function: Callable[..., Tree], *args: Avals) -> Captured:
    """Traces a function on abstract values. Where mesh axes are named, they have to be bound: see `with_axes`."""
    return Captured(*jax.make_jaxpr(function, return_shape=True)(*args))
