"""Finds out whether a result of a traced function is one of its inputs, unchanged.

Inside one trace the two would be the same object. The results of `jax.jit` and `jax.checkpoint` are always new objects, so
the bodies of these primitives are examined.
"""

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxpipe.model.jaxprs import CALLS, bodies, opened


def origin(traced: ClosedJaxpr, result: int) -> int | None:
    """The number of the input that the result with number `result` is; None if the result is computed.

    Args:
      traced: as `jax.make_jaxpr` returns it.
    """
    jaxpr = opened(traced)
    return _origin(jaxpr, jaxpr.outvars[result])


def _origin(jaxpr: Jaxpr, atom: Var | Literal) -> int | None:
    for number, variable in enumerate(jaxpr.invars):
        if variable is atom:
            return number
    for equation in jaxpr.eqns:
        for place, variable in enumerate(equation.outvars):
            if variable is atom:
                inner = _through(equation, place)
                return None if inner is None else _origin(jaxpr, equation.invars[inner])
    return None


def _through(equation: JaxprEqn, place: int) -> int | None:
    """The number of the operand that the result with number `place` of an equation is, or None."""
    inside = bodies(equation)
    if equation.primitive.name not in CALLS or len(inside) != 1:
        return None
    (body,) = inside
    if len(body.invars) != len(equation.invars) or len(body.outvars) != len(equation.outvars):
        return None
    return _origin(body, body.outvars[place])
