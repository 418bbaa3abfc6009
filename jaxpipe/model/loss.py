"""What a `loss_fn` may return, brought into one form: (sum, weight, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.errors import LossError
from jaxpipe.model.shapes import describe, sum_dtype

LossFn = Callable[[Any, Any], Any]

_RULE = (
    "loss_fn(outputs, labels) returns a scalar mean, or (sum, weight) for an exact weighted mean; either may be the first "
    'of a pair with a dict of metrics, or the entry "loss" of a dict with them.'
)


class LossTerms(NamedTuple):
    """The loss of one micro-batch on one data rank.

    Attributes:
      total, weight: the mean over any set of micro-batches and data ranks is (sum of totals) / (sum of weights).
      metrics: what the user returned beside the loss, as it is.
      is_mean: the loss was a plain mean over rows, which has weight 1 here. Among micro-batches of unlike size its right
        weight is their number of rows.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, Any]
    is_mean: bool


def loss_terms(loss_fn: LossFn | None, outputs: Any, labels: Any) -> LossTerms:
    """The loss of one micro-batch on one data rank.

    The weight is a constant to the derivative. Without a `loss_fn` the outputs are the loss.

    Raises:
      LossError: the result is none of the allowed forms.
    """
    if loss_fn is None and not hasattr(outputs, "shape"):
        raise LossError(
            f"The module has no loss_fn, so what its last layer returns is the loss, but that is {describe(outputs)}. Give "
            "PipelineModule a loss_fn, or evaluate with compute_loss=False."
        )
    result = outputs if loss_fn is None else loss_fn(outputs, labels)
    metrics: dict[str, Any] = {}
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], dict):
        result, metrics = result
    elif isinstance(result, dict) and "loss" in result:
        metrics = {name: value for name, value in result.items() if name != "loss"}
        result = result["loss"]
    if isinstance(result, (tuple, list)):
        if len(result) != 2:
            raise LossError(f"loss_fn returned a {type(result).__name__} of {len(result)} values. {_RULE}")
        total = _scalar(result[0], "the sum")
        weight = jax.lax.stop_gradient(jnp.asarray(result[1]).astype(total.dtype))
        return LossTerms(total, _scalar(weight, "the weight"), metrics, False)
    total = _scalar(result, "a value")
    return LossTerms(total, jnp.ones((), total.dtype), metrics, True)


def _scalar(value: Any, what: str) -> jax.Array:
    if not hasattr(value, "shape") and not isinstance(value, (int, float)):
        raise LossError(f"loss_fn returned {what} of type {type(value).__name__}. {_RULE}")
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        hint = " Reduce it, for example with .mean()." if value.shape else ""
        raise LossError(
            f"loss_fn returned {what} {describe(value)}, which is not a floating-point scalar.{hint} {_RULE}"
        )
    # Sums over micro-batches: in bfloat16 a count would stop at 256.
    return value.astype(sum_dtype(value.dtype))
