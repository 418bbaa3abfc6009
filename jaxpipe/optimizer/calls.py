"""Decides which equations that hold whole jaxprs are taken apart, and computes single equations."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpipe.model.jaxprs import CALLS, scan_counts

LONGEST_UNROLLED = 16  # steps of a scan


def taken_apart(eqn: jex.JaxprEqn, joins: bool) -> jex.ClosedJaxpr | None:
    """The jaxpr to put in the place of an equation, or None if the equation stays whole.

    Calls are always taken apart. A `cond` or a short `scan` is taken apart only if it reads values of several layers
    (`joins`): as one equation it would join whole layers, while in pieces most of it treats each layer on its own.
    """
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is None:
            return None
        return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, ())
    if not joins or eqn.effects:
        return None
    if name == "cond":
        return _all_branches(eqn)
    if name == "scan" and params["length"] <= LONGEST_UNROLLED:
        return _unrolled(eqn)
    return None


def _avals(atoms: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in atoms]


def _all_branches(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """Computes all branches and selects each output: that fuses, while a conditional copies what passes through it."""
    branches = eqn.params["branches"]

    def select(which: jax.Array, *args: jax.Array) -> list[jax.Array]:
        cases = zip(*[jex.jaxpr_as_fun(branch)(*args) for branch in branches], strict=True)
        which = jnp.clip(which, 0, len(branches) - 1)
        which = which.astype(bool) if len(branches) == 2 else which
        return [jax.lax.select_n(which, *case) for case in cases]

    return jax.make_jaxpr(select)(*_avals(eqn.invars))


def _unrolled(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """All steps of a `scan`, one after the other."""
    params, length = eqn.params, eqn.params["length"]
    num_consts, num_carry = scan_counts(eqn)
    body = jex.jaxpr_as_fun(params["jaxpr"])
    outputs = _avals(eqn.outvars[num_carry:])

    def steps(*args: jax.Array) -> list[jax.Array]:
        consts, carry, xs = args[:num_consts], args[num_consts : num_consts + num_carry], args[num_consts + num_carry :]
        ys: list[Sequence[jax.Array]] = [()] * length
        for i in reversed(range(length)) if params["reverse"] else range(length):
            out = body(*consts, *carry, *[x[i] for x in xs])
            carry, ys[i] = out[:num_carry], out[num_carry:]
        if not length:
            return [*carry, *[jnp.zeros(y.shape, y.dtype) for y in outputs]]
        return [*carry, *[jnp.stack(y) for y in zip(*ys, strict=True)]]

    return jax.make_jaxpr(steps)(*_avals(eqn.invars))


def bind(primitive: jex.Primitive, params: dict[str, Any], *args: ArrayLike) -> list[jax.Array]:
    """Computes the outputs of one equation."""
    out: Any = primitive.bind(*args, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


def masked_while(params: dict[str, Any], wanted: jax.Array, *args: jax.Array) -> list[jax.Array]:
    """Computes a `while` equation, without any iteration where `wanted`, bool [], is false.

    Padding is not wanted: on arbitrary numbers the loop might never end.
    """
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond, body = jex.jaxpr_as_fun(params["cond_jaxpr"]), jex.jaxpr_as_fun(params["body_jaxpr"])
    cond_consts, body_consts = args[:num_cond], args[num_cond : num_cond + num_body]
    return list(
        jax.lax.while_loop(
            lambda carry: wanted & cond(*cond_consts, *carry)[0],
            lambda carry: tuple(body(*body_consts, *carry)),
            tuple(args[num_cond + num_body :]),
        )
    )
