"""Finds out whether a result of a traced function is one of its inputs, unchanged.

Inside one trace the two would be the same object. The results of `jax.jit`, `jax.checkpoint`, loops and conditionals are
always new objects, so the bodies of these primitives are examined. flax hands whole modules through each of them.
"""

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxpipe.model.jaxprs import CALLS, bodies, opened, scan_counts


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
    name, params, count = equation.primitive.name, equation.params, len(equation.invars)
    inside = bodies(equation)
    if name == "cond":  # its first operand chooses
        found = {_origin(body, body.outvars[place]) for body in inside}
        (inner,) = found if len(found) == 1 else (None,)
        return None if inner is None else inner + 1
    if name == "while" and "body_nconsts" in params:
        body, constants = opened(params["body_jaxpr"]), params["body_nconsts"]
        same = _origin(body, body.outvars[place]) == constants + place
        return params["cond_nconsts"] + constants + place if same else None
    if len(inside) != 1:
        return None
    (body,) = inside
    if len(body.invars) != count or len(body.outvars) != len(equation.outvars):
        return None
    inner = _origin(body, body.outvars[place])
    if name in CALLS or inner is None:
        return inner
    if name == "scan":
        constants, carried = scan_counts(equation)
        if place < carried:
            return inner if inner == constants + place else None
        return inner if inner >= constants + carried else None  # slice by slice what is scanned over
    return None
