"""Which dims of a result of a traced function are those of the iterations of a loop.

What the body of a `scan` gives for each iteration comes out of it with a dim more. The shape does not say which one that
is, or whether there is one; the jaxpr does. (`vmap` leaves no trace in a jaxpr, so its dims are not found.)
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jaxpipe.model.jaxprs import CALLS, bodies, opened, scan_counts
from jaxpipe.model.shapes import avals


def loop_dims(function: Callable[..., Any], *args: Any) -> list[tuple[int, ...]]:
    """For each leaf of what `function(*args)` returns, its dims that count iterations, in order; () for most values.

    Args:
      args: pytrees of arrays or of their shapes. Nothing is computed.
    """
    traced = jax.make_jaxpr(function)(*avals(args))
    jaxpr = opened(traced)
    return [tuple(sorted(_dims(jaxpr, variable))) for variable in jaxpr.outvars]


def _dims(jaxpr: Jaxpr, atom: Var | Literal) -> frozenset[int]:
    for equation in jaxpr.eqns:
        for place, variable in enumerate(equation.outvars):
            if variable is atom:
                return _made_by(jaxpr, equation, place)
    return frozenset()


def _made_by(jaxpr: Jaxpr, equation: JaxprEqn, place: int) -> frozenset[int]:
    name, inside = equation.primitive.name, bodies(equation)
    if name in ("convert_element_type", "optimization_barrier"):
        return _dims(jaxpr, equation.invars[place])
    if name == "transpose":  # flax puts the dim of a loop where it was asked to
        dims = _dims(jaxpr, equation.invars[0])
        return frozenset(new for new, old in enumerate(equation.params["permutation"]) if old in dims)
    if len(inside) != 1 or len(inside[0].outvars) != len(equation.outvars):
        return frozenset()
    inner = _dims(inside[0], inside[0].outvars[place])
    if name in CALLS:
        return inner
    if name == "scan" and place >= scan_counts(equation)[1]:
        return frozenset({0, *(dim + 1 for dim in inner)})
    return frozenset()
