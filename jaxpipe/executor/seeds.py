"""What the backward passes of a step start from: the gradient of the objective by each of the losses.

    objective = (sum of totals) / (sum of weights) + (sum of extra losses) / (micro-batches x data ranks)

Both divisors are known before any output is, so no backward pass has to be linear in what it starts from.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.model.context import Aux
from jaxpipe.model.loss import over
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Leaves, Tree


class Seeds(NamedTuple):
    """The gradients of the objective, times the loss scale if there is one.

    Attributes:
      total: by the total that `loss_fn` gives for a micro-batch on a data rank, a scalar []. It is 0 where all weights
        together are 0.
      extra: by each extra loss of a layer, a scalar []; None if no layer has any.
    """

    total: jax.Array
    extra: jax.Array | None = None

    @classmethod
    def of(cls, weight: jax.Array, parts: int, extra: Avals, scale: jax.Array | None) -> "Seeds":
        """The seeds of a step.

        Args:
          weight: the sum of all weights, a scalar [].
          parts: micro-batches times data ranks.
          extra: the abstract value of the seed of extra losses, or None.
          scale: that of the loss, or None.
        """
        total = over(jnp.ones_like(weight), weight)
        other = None if extra is None else jnp.full((), 1 / parts, extra.dtype)
        if scale is None:
            return cls(total, other)
        return cls(total * scale.astype(total.dtype), None if other is None else other * scale.astype(other.dtype))


# The extra losses of each part, by name.
Losses = list[dict[str, jax.Array]]


def losses_of(beside: Iterable[Aux]) -> Losses:
    """The extra losses among what some layers or parts give."""
    return [dict(aux.losses) for aux in beside]


def aval_of(beside: Iterable[Aux]) -> Avals:
    """The abstract value of the seed of extra losses, from those of what layers or parts give; None if none has any."""
    dtypes = [loss.dtype for loss in jax.tree.leaves(losses_of(beside))]
    return jax.ShapeDtypeStruct((), np.result_type(*dtypes)) if dtypes else None


def of_losses(extra: jax.Array | None, losses: Losses) -> Losses:
    """The cotangents of the extra losses of some parts: the same one for each loss of each layer."""
    if extra is None:
        return [{} for _ in losses]
    return [{name: jnp.full(a.shape, extra.astype(a.dtype)) for name, a in each.items()} for each in losses]


def unless_zero(y: Tree, seed: jax.Array) -> Tree:
    """`y`, whose gradient is 0 if `seed` is.

    Where nothing counts, the loss may be infinite and its gradient, 0 x infinity, not a number. Extra losses count all the
    same, so this must not get into the gradient of the layers.
    """
    leaves, rebuild = split_inexact(y)
    return rebuild(_unless_zero(leaves, seed))


@jax.custom_vjp
def _unless_zero(leaves: Leaves, seed: jax.Array) -> Leaves:
    del seed
    return leaves


def _forward(leaves: Leaves, seed: jax.Array) -> tuple[Leaves, jax.Array]:
    return leaves, seed


def _backward(seed: jax.Array, grads: Leaves) -> tuple[Leaves, jax.Array]:
    return [jnp.where(seed == 0, 0, grad) for grad in grads], jnp.zeros_like(seed)


_unless_zero.defvjp(_forward, _backward)
