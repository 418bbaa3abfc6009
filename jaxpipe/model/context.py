"""What passes between a layer and the pipeline beside params, input and output.

A layer is `apply(params, x, context, train) -> (y, aux)` everywhere inside of jaxpipe. Whoever gives layers something new
adds a field to `Context`, and whoever takes something new from them adds one to `Aux`; what lies between hands on both
without looking into them. Both are pytrees, and a field that is not used has no leaves.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxpipe.types import Key, Tree


class Context(NamedTuple):
    """What a layer is given beside its params and its input.

    Attributes:
      key: its PRNG key for this micro-batch, or None.
      state: its state before this micro-batch; `{}` if it has none.
      cache: while tokens are generated, what a layer with a cache has kept of the positions before; else None.
      position: while tokens are generated, the index of the first position of `x`, int32 []; else None.
    """

    key: Key | None = None
    state: Tree = {}
    cache: Tree = None
    position: jax.Array | None = None


class Aux(NamedTuple):
    """What a layer gives beside its output.

    Attributes:
      state: its state after this micro-batch; `{}` if it has none.
      losses: extra losses by name, scalars [], float32 or wider.
      metrics: metrics by name. A kind gives each as a `Metric`, and the trace of a layer as `Joined`, the terms that are
        joined over layers, micro-batches and devices.
      cache: the cache with the positions of `x`; None if the context had none.
    """

    state: Tree = {}
    losses: Mapping[str, Any] = {}
    metrics: Mapping[str, Any] = {}
    cache: Tree = None
