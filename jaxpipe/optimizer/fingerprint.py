"""A hashable value for what an equation of a jaxpr does; two are equal only where both equations do the same."""

from collections.abc import Hashable

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Elements. Larger arrays are compared by identity: reading them costs more than taking two equal ones for different.
MAX_COMPARED = 1024


def fingerprint(x: object) -> Hashable:
    """A hashable value that is equal for two parameters of equations only if they mean the same.

    Jaxprs are compared by structure, because every trace makes new ones. Where nothing is known about a value, its identity
    decides. So two values that mean the same may have different fingerprints, but never the other way round. A value that
    is compared by its `id` must live as long as its fingerprint; those in a jaxpr live as long as the jaxpr.
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


def _of_jaxpr(jaxpr: jex.Jaxpr) -> Hashable:
    """The fingerprint of a jaxpr, in which a variable is the number of its first appearance."""
    number: dict[jex.Var, int] = {}

    def name(v: jex.Var | jex.Literal) -> Hashable:
        if isinstance(v, jex.Literal):
            return fingerprint(v.val), str(v.aval)
        return number.setdefault(v, len(number)), str(v.aval)

    head = [name(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    body = [
        (eqn.primitive, fingerprint(eqn.params), *map(name, eqn.invars), *map(name, eqn.outvars)) for eqn in jaxpr.eqns
    ]
    consts = tuple(map(fingerprint, getattr(jaxpr, "consts", ())))
    return tuple(head), tuple(body), tuple(map(name, jaxpr.outvars)), consts
