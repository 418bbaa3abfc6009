"""`LayerOut`: what a layer may return in the place of its output, with losses and metrics beside it.

    def apply(params, x):
        y, fraction, probability = experts(params, x)
        balance = 0.01 * len(fraction) * (fraction * probability).sum()
        return jaxpipe.LayerOut(y, losses={"balance": balance}, metrics={"busiest": fraction.max()})

The objective of a training step is that of `loss_fn`, plus the mean of each extra loss over all micro-batches and data
ranks; the coefficient is a part of the loss that the layer gives. Where several layers give a loss of one name, their
losses are added up, and metrics of one name are joined by their rule, so that plain values are averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpipe.types import Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerOut:
    """The output of a layer, with extra losses and metrics.

    Any layer may return it, at any stage: a function, the `apply` of a `Layer`, the `__call__` of a flax module. It is the
    whole of what the layer returns (but for the state of a layer that has one) and no part of a pytree.

    Attributes:
      y: the output, any pytree, which the next layer takes.
      losses: by name, real scalars [], one for the rows of this micro-batch on this data rank. Each is a part of the
        objective, so it has its coefficient in it, and usually is a mean over rows. It is summed in float32 (float64 if it
        has 64 bits), whatever the layer computes in.
      metrics: by name, in the forms that `jaxpipe.metrics` describes, but for `Concat`. They have no derivative.
    """

    y: Tree
    losses: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
