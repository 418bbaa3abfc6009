"""Brings everything that a `loss_fn` may return into one form: (total, weight, metrics)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxpipe.errors import DataError, LossError
from jaxpipe.mesh import DATA, manual_axes
from jaxpipe.model import loss_weight
from jaxpipe.model.abstract import refuse_deadlocks
from jaxpipe.model.blame import Fault
from jaxpipe.model.layer_out import LayerOut
from jaxpipe.model.shapes import describe, sum_dtype
from jaxpipe.types import AnyArray, Avals, LossFn, Tree

Array = TypeVar("Array", bound=AnyArray)

_RULE = (
    "loss_fn(outputs, labels) returns a scalar mean, or jaxpipe.Weighted(total, weight) for an exactly weighted mean; "
    'either may be the first of a pair with a dict of metrics, or the entry "loss" of a dict with them.'
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weighted:
    """A loss that is not the mean over rows, but a weighted mean, such as the mean over all tokens that are not padding.

    The loss of any set of micro-batches and data ranks is (sum of their totals) / (sum of their weights), and 0 if the sum
    of the weights is 0.

        def loss_fn(logits, labels):
            mask = labels >= 0
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jaxpipe.Weighted((each * mask).sum(), mask.sum())

    Attributes:
      total: the sum of the losses, a floating-point scalar [].
      weight: the sum of the weights, a real scalar [] (a float, an integer or a boolean; it may be negative). It may depend
        on the labels and on the shapes of the outputs, but not on the values of the outputs, because it is a constant to
        the gradient.
    """

    total: ArrayLike
    weight: ArrayLike


class LossTerms(NamedTuple):
    """The loss of one micro-batch on one data rank.

    Attributes:
      total, weight: scalars [] of one dtype, float32 or wider. The mean over any set of micro-batches and data ranks is
        (sum of totals) / (sum of weights).
      metrics: what the user returned beside the loss, unchanged.
      is_mean: whether the loss was a plain mean over rows. It has the weight 1 here; among micro-batches of different
        sizes, the right weight is the number of rows.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, Any]
    is_mean: bool


class LossShapes(NamedTuple):
    """The shapes of `LossTerms`; `is_mean` means the same."""

    total: jax.ShapeDtypeStruct
    weight: jax.ShapeDtypeStruct
    is_mean: bool


def loss_terms(loss_fn: LossFn | None, outputs: Tree, labels: Tree) -> LossTerms:
    """Computes the loss of one micro-batch on one data rank.

    The weight is a constant to the derivative.

    Args:
      loss_fn: None if the outputs are the loss.
      outputs, labels: leaves [B, ...].

    Raises:
      LossError: the result has none of the allowed forms. What `loss_fn` itself raises is raised as it is, with a note.
    """
    if loss_fn is None and not hasattr(outputs, "shape"):
        raise LossError(
            f"The module has no loss_fn, so what its last layer returns is the loss, but that is {describe(outputs)}. Give "
            "PipelineModule a loss_fn, or evaluate with compute_loss=False."
        )
    result = outputs if loss_fn is None else call("loss_fn", loss_fn, outputs, labels)
    metrics: dict[str, Any] = {}
    if isinstance(result, LayerOut):
        raise LossError(
            "loss_fn returned a jaxpipe.LayerOut, which is for layers. Add what you want to train to the loss, and return "
            '(loss, {"name": metric}).'
        )
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], Mapping):
        result, metrics = result[0], dict(result[1])
    elif isinstance(result, Mapping) and "loss" in result:
        metrics = {name: value for name, value in result.items() if name != "loss"}
        result = result["loss"]
    if isinstance(result, (tuple, list)):
        raise LossError(_not_one_loss(result))
    if isinstance(result, Weighted):
        total = _total(result.total, "Weighted with the total")
        return LossTerms(total, jax.lax.stop_gradient(_weight(result.weight, total.dtype)), metrics, False)
    total = _total(result, "a value")
    return LossTerms(total, jnp.ones((), total.dtype), metrics, True)


def loss_shapes(loss_fn: LossFn | None, outputs: Avals, labels: Avals, mesh: Mesh | None = None) -> LossShapes:
    """The shapes of the loss terms of one micro-batch on one data rank. Nothing is computed.

    Args:
      outputs, labels: shapes [B, ...].
      mesh: the mesh whose axes `loss_fn` may name. With None, "data" is an axis of one device.

    Raises:
      LossError: `loss_fn` returns none of the allowed forms, or a weight that depends on the outputs.
      DataError: `loss_fn` needs labels, and there are none.
    """
    is_mean = True
    axes = [(DATA, 1)] if mesh is None else [(axis, mesh.shape[axis]) for axis in sorted(manual_axes(mesh))]

    def terms(outputs: Tree, labels: Tree) -> tuple[jax.Array, jax.Array]:
        nonlocal is_mean
        total, weight, _, is_mean = loss_terms(loss_fn, outputs, labels)
        return total, weight

    try:
        traced, shapes = jax.make_jaxpr(terms, axis_env=axes, return_shape=True)(outputs, labels)
    except LossError:
        raise
    except Exception as error:
        if jax.tree.leaves(labels):
            raise
        text = str(error).strip().splitlines()
        raise DataError(
            f"The labels are {labels!r}, but loss_fn needs them: {type(error).__name__}: "
            f"{text[0].rstrip('.') if text else 'no message'}. Pass labels, or (in evaluation) compute_loss=False."
        ) from error
    if mesh is not None:
        try:
            refuse_deadlocks(traced, mesh)
        except Fault as fault:
            raise LossError(f"loss_fn {fault}") from fault
    if loss_weight.depends(traced, range(len(jax.tree.leaves(outputs))))[1]:
        raise LossError(
            "loss_fn returned a jaxpipe.Weighted whose weight depends on the outputs of the model. The weight is a "
            "constant to the gradient, so a part of that would be lost. Compute the weight from the labels (a mask can be "
            "one of them), or divide inside loss_fn and return the mean."
        )
    return LossShapes(shapes[0], shapes[1], is_mean)


def weight_from_labels(loss_fn: LossFn | None, outputs: Avals, labels: Tree) -> jax.Array:
    """Computes the weight of one micro-batch on one data rank, a scalar [], before its outputs are known.

    Args:
      outputs: shapes [B, ...]. The weight does not depend on the numbers; see `loss_shapes`.
      labels: arrays [B, ...].
    """
    return loss_weight.without(lambda y, t: loss_terms(loss_fn, y, t).weight, outputs, labels)


def over(total: Array, weight: Array) -> Array:
    """total / weight, and 0 where the weight is 0, because nothing counted. Every weighted mean follows this rule.

    Args:
      total, weight: arrays that broadcast, of JAX or of NumPy.

    Returns:
      An array of the same library.
    """
    xp: Any = jnp if isinstance(total, jax.Array) else np  # NumPy: in float64, between the batches of a data set
    counted = weight != 0
    return xp.where(counted, total / xp.where(counted, weight, xp.ones_like(weight)), xp.zeros_like(total))


def call(name: str, function: LossFn, outputs: Tree, labels: Tree) -> Any:
    """Returns `function(outputs, labels)`. What it raises is raised as it is, with a note that says where it happened.

    Args:
      name: how messages call the function.

    Raises:
      LossError: it is no function.
    """
    if not callable(function):
        raise LossError(f"{name} is {function!r}, which cannot be called. Pass a function of (outputs, labels).")
    try:
        return function(outputs, labels)
    except Exception as error:
        error.add_note(f"Raised by {name}(outputs, labels) with outputs {_shown(outputs)} and labels {_shown(labels)}.")
        raise


def _shown(tree: Tree) -> str:
    try:
        return describe(tree)
    except Exception:  # a leaf is no array; that does not matter, since this is only a note on another error
        return f"{tree!r:.200}"


def _not_one_loss(result: Sequence[object]) -> str:
    kind = f"a {type(result).__name__} of {len(result)} values"
    if len(result) == 2 and all(isinstance(a, int | float) or getattr(a, "shape", None) == () for a in result):
        return (
            "loss_fn returned a pair of scalars, which is ambiguous: (loss, accuracy) or (sum, weight)? Write "
            'jaxpipe.Weighted(total, weight) for a weighted mean, or (loss, {"accuracy": ...}) for a loss and a metric.'
        )
    return f"loss_fn returned {kind}. {_RULE}"


def _array(value: Any, what: str) -> jax.Array:
    if not hasattr(value, "shape") and not isinstance(value, (bool, int, float, complex)):
        raise LossError(f"loss_fn returned {what} of type {type(value).__name__}. {_RULE}")
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LossError(f"loss_fn returned {what} {value!r:.200}, which is not a number for JAX. {_RULE}") from error
    if value.shape:
        raise LossError(
            f"loss_fn returned {what} {describe(value)}, which is not a floating-point scalar. Reduce it, for example with "
            f".mean(). {_RULE}"
        )
    return value


def _total(value: Any, what: str) -> jax.Array:
    value = _array(value, what)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise LossError(f"loss_fn returned {what} {describe(value)}, which is not a floating-point scalar. {_RULE}")
    # Widened, because it is summed over micro-batches: in bfloat16 a count would stop at 256.
    return value.astype(sum_dtype(value.dtype))


def _weight(value: Any, dtype: jnp.dtype) -> jax.Array:
    what = "Weighted with the weight"
    value = _array(float(value) if type(value) is int and abs(value) < 2**100 else value, what)
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    if not real and value.dtype != bool:
        raise LossError(f"loss_fn returned {what} {describe(value)}, which is not a real scalar. {_RULE}")
    return value.astype(dtype)
