"""The oracle: one device, a plain loop over micro-batches, no schedule.

It shares the layers, their keys and the meaning of `loss_fn` with the pipeline, and none of its machinery.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.model import keys
from jaxpipe.model.loss import loss_terms
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.shapes import sum_dtype

Tree = Any


def forward(
    module: PipelineModule, layers: Sequence[Any], x: Tree, key: jax.Array | None = None, train: bool = False
) -> Tree:
    """The layers one after the other; `key` is that of the micro-batch."""
    for index, layer in enumerate(module.layers):
        layer_key = None if key is None else keys.layer_key(key, index)
        x = layer.apply(layers[module.owners[index]], x, layer_key, train)
    return x


def value_and_grad(
    module: PipelineModule,
    layers: Sequence[Any],
    batch: tuple[Tree, Tree],
    key: jax.Array | int | None = None,
    *,
    num_data_ranks: int = 1,
) -> tuple[jax.Array, list[Any]]:
    """Loss and gradients, per layer, of a whole batch.

    Args:
      layers: per layer, its own params (as `Pipeline.to_layers` gives).
      batch: (inputs, labels) with leaves [M, B, ...].
      key: of the step, for dropout; None switches dropout off.
      num_data_ranks: rows of a micro-batch are cut into so many parts with dropout keys of their own.

    Returns:
      The loss (a scalar) and the gradients in the structure of `layers`, on the devices of `layers`.
    """
    root = None if key is None else keys.as_key(key)
    homes = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), list(layers))
    # Sharded params would bring their mesh along; the oracle is one device.
    layers, (inputs, labels) = jax.device_put((list(layers), batch), jax.devices()[0])

    def part_loss(layers: list[Any], x: Tree, labels: Tree, part_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        terms = loss_terms(module.loss_fn, forward(module, layers, x, part_key, train=True), labels)
        return terms.total, terms.weight

    step = jax.jit(jax.value_and_grad(part_loss, has_aux=True, allow_int=True))
    total: Any = 0.0
    weight: Any = 0.0
    grads = None
    for m in range(jax.tree.leaves(inputs)[0].shape[0]):
        for rank in range(num_data_ranks):

            def part(leaf: jax.Array, m: int = m, rank: int = rank) -> jax.Array:
                rows = leaf.shape[1] // num_data_ranks
                return leaf[m, rank * rows : (rank + 1) * rows]

            part_key = None if root is None else keys.micro_batch_key(root, m, rank)
            (t, w), g = step(layers, jax.tree.map(part, inputs), jax.tree.map(part, labels), part_key)
            total, weight = total + t, weight + w
            g = jax.tree.map(_wide, g)
            grads = g if grads is None else jax.tree.map(_plus, grads, g)
    grads = jax.tree.map(lambda g, p: _over(g, weight, p), grads, layers)
    # Back to where the params lie, so that they can be compared with the pipeline's without moving anything.
    return total / weight, jax.tree.map(lambda g, home: g if home is None else jax.device_put(g, home), grads, homes)


def _wide(grad: jax.Array) -> jax.Array:
    return grad if grad.dtype == jax.dtypes.float0 else grad.astype(sum_dtype(grad.dtype))


def _plus(a: jax.Array, b: jax.Array) -> jax.Array:
    return a if a.dtype == jax.dtypes.float0 else a + b


def _over(grad: jax.Array, weight: jax.Array, param: jax.Array) -> jax.Array:
    return jnp.zeros_like(param) if grad.dtype == jax.dtypes.float0 else (grad / weight).astype(param.dtype)
