"""What an equation of a jaxpr does, as a hashable value: equal only where it is the same."""

from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Larger arrays are compared by identity: reading them costs more than a missed likeness.
MAX_COMPARED = 1024


def fingerprint(x: Any) -> Any:
    """Hashable; equal for parameters of equations that mean the same.

    Jaxprs are compared by structure, since every trace makes new ones. Where nothing is known, identity decides: two like
    things may get two fingerprints, and never the other way round. (An object that is compared by its `id` has to live
    for as long as the fingerprint does; those in a jaxpr live as long as the jaxpr.)
    """
    if isinstance(x, jex.ClosedJaxpr) and x.jaxpr is not x:  # from JAX 0.12 on, both are one class
        return fingerprint(x.jaxpr), tuple(map(fingerprint, x.consts))
    if isinstance(x, jex.Jaxpr):
        return _of_jaxpr(x)
    if isinstance(x, dict):
        return tuple((key, fingerprint(value)) for key, value in x.items())
    if isinstance(x, (tuple, list)):
        return type(x).__name__, tuple(map(fingerprint, x))
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        if isinstance(x, Tracer) or x.size > MAX_COMPARED or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return "array", id(x)
        return str(x.dtype), x.shape, np.asarray(x).tobytes()
    if isinstance(x, float):
        return float, x.hex()  # 0.0 and -0.0 are equal, and every NaN is unlike itself
    try:
        hash(x)
    except TypeError:
        return "object", id(x)
    return type(x), x


def _of_jaxpr(jaxpr: Any) -> Any:
    """Variables by the order in which they appear."""
    number: dict[Any, int] = {}

    def name(v: Any) -> Any:
        if isinstance(v, jex.Literal):
            return fingerprint(v.val), str(v.aval)
        return number.setdefault(v, len(number)), str(v.aval)

    head = [name(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    body = [
        (eqn.primitive, fingerprint(eqn.params), *map(name, eqn.invars), *map(name, eqn.outvars)) for eqn in jaxpr.eqns
    ]
    consts = tuple(map(fingerprint, getattr(jaxpr, "consts", ())))
    return tuple(head), tuple(body), tuple(map(name, jaxpr.outvars)), consts
