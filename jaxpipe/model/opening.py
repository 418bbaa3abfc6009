"""Takes apart what a layer has returned: its output, and the extra losses and metrics beside it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.errors import LossError
from jaxpipe.model.blame import Fault
from jaxpipe.model.context import Aux
from jaxpipe.model.layer_out import LayerOut
from jaxpipe.model.metrics import ROWS, Metric, as_metric
from jaxpipe.model.shapes import describe, sum_dtype
from jaxpipe.types import Tree


class Opened(NamedTuple):
    """What a layer has returned, taken apart.

    Attributes:
      y: its output.
      losses: scalars [], float32 or wider, by name.
      metrics: by name, each with its rule.
    """

    y: Tree
    losses: dict[str, jax.Array]
    metrics: dict[str, Metric]


def opened(result: Any, sown: Aux = Aux()) -> Opened:  # noqa: B008  # a tuple
    """Takes apart what a layer has returned.

    Args:
      sown: losses and metrics that it has put beside it in another way.

    Raises:
      Fault: it is a `LayerOut` in which something has not the form that it must have, or one is a part of a pytree.
    """
    y, losses, metrics = (result.y, result.losses, result.metrics) if isinstance(result, LayerOut) else (result, {}, {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(y, is_leaf=_is_layer_out):
        if _is_layer_out(leaf):
            where = f"as the entry {jax.tree_util.keystr(path)} of a pytree" if path else "inside of another one"
            raise Fault(
                f"returned a jaxpipe.LayerOut {where}. A LayerOut is the whole of what a layer returns: put the pytree "
                "into it, LayerOut(pytree, losses=..., metrics=...)."
            )
    losses, metrics = _names("losses", losses), _names("metrics", metrics)
    for twice in sorted((losses.keys() & sown.losses.keys()) | (metrics.keys() & sown.metrics.keys())):
        raise Fault(f"sows {twice!r}, and gives it in a jaxpipe.LayerOut as well. Rename one of the two.")
    losses, metrics = {**losses, **sown.losses}, {**metrics, **sown.metrics}
    return Opened(
        y,
        {name: _loss(name, value) for name, value in losses.items()},
        {name: _metric(name, value) for name, value in metrics.items()},
    )


def _is_layer_out(value: Any) -> bool:
    return isinstance(value, LayerOut)


def _names(what: str, found: Any) -> dict[str, Any]:
    rule = f"LayerOut(..., {what}=...) takes a dict of names and values, and a name is a string with something in it."
    if not isinstance(found, Mapping):
        raise Fault(f"gives a jaxpipe.LayerOut with {what}={found!r:.80}. {rule}")
    for name in found:
        if not isinstance(name, str) or not name:
            raise Fault(f"gives a jaxpipe.LayerOut with {what} of the name {name!r:.80}. {rule}")
    return dict(found)


def _loss(name: str, value: Any) -> jax.Array:
    rule = "An extra loss is a real scalar for the whole micro-batch: reduce it, for example with .mean()."
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float)) or isinstance(value, bool):
        raise Fault(f"gives the extra loss {name!r} of type {type(value).__name__}. {rule}")
    array = jnp.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if real and array.ndim == 1:
        rule += " (What is sown in a vmapped block is a value per copy: sow the sum outside of it.)"
    if array.shape or not real:
        raise Fault(f"gives the extra loss {name!r} as {describe(array)}, which is not a real scalar. {rule}")
    # Widened, because it is summed over layers and micro-batches.
    dtype = sum_dtype(array.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else jnp.float32
    return jax.lax.convert_element_type(array, dtype)


def _metric(name: str, value: Any) -> Metric:
    try:
        metric = as_metric(name, value)
    except LossError as error:
        raise Fault(f"gives a metric that has none of the forms of metrics. {error}") from error
    if metric.join == ROWS:
        raise Fault(
            f"gives the metric {name!r} as a metrics.Concat. Values per row come from the last layer alone: let loss_fn "
            "return them, or give a Mean, Sum, Max or Min here."
        )
    return metric
