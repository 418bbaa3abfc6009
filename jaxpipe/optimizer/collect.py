"""The one collective of an optimizer step: values of layers, gathered on all ranks."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpipe.mesh import PIPE, pipe_size
from jaxpipe.model.shapes import aval
from jaxpipe.model.values import raw, typed
from jaxpipe.optimizer.trace import SMALL


def everywhere(arrays: Sequence[jax.Array], mesh: Mesh) -> list[jax.Array]:
    """Gathers arrays [K, ...] of each rank to arrays [S, K, ...] on all ranks. It runs inside `shard_map`.

    Small arrays of one dtype travel together. Arrays of typed PRNG keys travel alone.
    """
    if pipe_size(mesh) == 1:
        return [a[None] for a in arrays]
    together: dict[Hashable, list[int]] = {}
    for i, a in enumerate(arrays):
        alone = math.prod(a.shape[1:]) > SMALL or jnp.issubdtype(a.dtype, jax.dtypes.extended)
        together.setdefault(i if alone else a.dtype, []).append(i)
    out: list[Any] = [None] * len(arrays)  # filled below
    for members in together.values():
        some = [arrays[i] for i in members]
        if len(some) == 1:
            out[members[0]] = typed(jax.lax.all_gather(raw(some[0]), PIPE), aval(some[0]))
            continue
        flat = jax.lax.all_gather(jnp.concatenate([a.ravel() for a in some]), PIPE)
        ends = np.cumsum([a.size for a in some])[:-1]
        for i, a, part in zip(members, some, jnp.split(flat, ends, axis=1), strict=True):
            out[i] = part.reshape(-1, *a.shape)
    return out
