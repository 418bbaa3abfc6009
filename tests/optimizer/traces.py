"""Small traces of transformations of like layers."""

import jax
import jax.extend.core
import jax.numpy as jnp

from jaxpipe.optimizer.trace import Trace

A, B, C = ("Block", 0), ("Block", 1), ("Block", 2)
X = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def traced(function, homes, out_homes, avals=None):
    avals = avals or [X] * len(homes)
    closed = jax.make_jaxpr(function)(*avals)
    return Trace(closed, homes, [("in", "w") if home else None for home in homes], out_homes)
