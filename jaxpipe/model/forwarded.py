"""Whether a result of a traced function is one of its inputs, unchanged.

Inside one trace the two would be the same object. Not so behind `jax.jit` or `jax.checkpoint`, whose results are new
objects in any case: their bodies have to be read.
"""

from typing import Any

# Primitives that run one body on their own inputs and return what it returns.
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


def origin(traced: Any, result: int) -> int | None:
    """The number of the input that result number `result` of a jaxpr is, or None if it is computed."""
    jaxpr = _open(traced)
    return _origin(jaxpr, jaxpr.outvars[result])


def _open(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one; newer versions of JAX have one kind only."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _origin(jaxpr: Any, atom: Any) -> int | None:
    for number, variable in enumerate(jaxpr.invars):
        if variable is atom:
            return number
    for equation in jaxpr.eqns:
        for place, variable in enumerate(equation.outvars):
            if variable is atom:
                inner = _through(equation, place)
                return None if inner is None else _origin(jaxpr, equation.invars[inner])
    return None


def _through(equation: Any, place: int) -> int | None:
    bodies = [_open(value) for value in equation.params.values() if hasattr(_open(value), "eqns")]
    if equation.primitive.name not in _CALLS or len(bodies) != 1:
        return None
    (body,) = bodies
    if len(body.invars) != len(equation.invars) or len(body.outvars) != len(equation.outvars):
        return None
    return _origin(body, body.outvars[place])
