"""Finds out whether a result of a traced function is one of its inputs, unchanged.

Inside one trace the two would be the same object. The results of `jax.jit` and `jax.checkpoint` are always new objects, so
the bodies of these primitives are examined.
"""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

# Primitives that run one body on their own inputs, and return what it returns.
_CALLS = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}


def origin(traced: ClosedJaxpr, result: int) -> int | None:
    """The number of the input that the result with number `result` is; None if the result is computed.

    Args:
      traced: as `jax.make_jaxpr` returns it.
    """
    jaxpr = _open(traced)
    return _origin(jaxpr, jaxpr.outvars[result])


def _open(jaxpr: Any) -> Jaxpr:
    """The jaxpr inside a closed one. In newer versions of JAX the two are one class."""
    return getattr(jaxpr, "jaxpr", jaxpr)


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
    bodies = [_open(value) for value in equation.params.values() if hasattr(_open(value), "eqns")]
    if equation.primitive.name not in _CALLS or len(bodies) != 1:
        return None
    (body,) = bodies
    if len(body.invars) != len(equation.invars) or len(body.outvars) != len(equation.outvars):
        return None
    return _origin(body, body.outvars[place])
