"""The oracle: one device, one derivative of the whole loss, no schedule.

It shares with the pipeline what is agreed from outside: where a layer's weights and keys come from, and how one entry of
the list is called. It has its own reading of what `loss_fn` returns, calls every entry by itself, whether or not another
one is like it, and knows neither stages nor what a backward pass starts from.
"""

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.model import keys
from jaxpipe.model.layers import BoundLayer, bind_alone
from jaxpipe.model.loss import Weighted
from jaxpipe.model.module import PipelineModule
from jaxpipe.types import Key, Leaves, Params, Tree

# Per module: its entries, each bound by itself, and the compiled derivatives.
_bound: weakref.WeakKeyDictionary[PipelineModule, tuple[BoundLayer, ...]] = weakref.WeakKeyDictionary()
_compiled: weakref.WeakKeyDictionary[PipelineModule, dict[Hashable, Callable[..., Tree]]] = weakref.WeakKeyDictionary()


def forward(
    module: PipelineModule, layers: Sequence[Params], x: Tree, key: Key | None = None, train: bool = False
) -> Tree:
    """The layers one after the other; `key` is that of the micro-batch."""
    return _forward(_entries(module), module.owners, layers, x, key, train)


def value_and_grad(
    module: PipelineModule,
    layers: Sequence[Params],
    batch: tuple[Tree, Tree],
    key: jax.Array | int | None = None,
    *,
    num_data_ranks: int = 1,
) -> tuple[jax.Array, list[Params]]:
    """Loss and gradients, per layer, of a whole batch.

    It is `jax.value_and_grad` of one function, the mean over all micro-batches and data ranks, so it needs the memory for
    the activations of all of them.

    Args:
      layers: per layer, its own params (as `Pipeline.to_layers` gives).
      batch: (inputs, labels) with leaves [M, B, ...].
      key: of the step, for dropout; None switches dropout off.
      num_data_ranks: rows of a micro-batch are cut into so many parts with dropout keys of their own.

    Returns:
      The loss (a scalar) and the gradients in the structure of `layers`, on the devices of `layers`.
    """
    root = None if key is None else keys.as_key(key)
    homes = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(list(layers))]
    # Sharded params would bring their mesh along; the oracle is one device.
    layers, (inputs, labels) = jax.device_put((list(layers), batch), jax.devices()[0])
    known = _compiled.setdefault(module, {})
    chosen = module.loss_fn, num_data_ranks
    if chosen not in known:
        known[chosen] = jax.jit(jax.value_and_grad(_whole_loss(module, num_data_ranks), has_aux=True))
    leaves, structure = jax.tree.flatten(layers)
    trained = [_wide(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None for leaf in leaves]
    (loss, weight), found = known[chosen](trained, layers, inputs, labels, root)
    grads = [
        jnp.zeros_like(leaf) if grad is None else jnp.where(weight == 0, 0, grad).astype(leaf.dtype)
        for leaf, grad in zip(leaves, found, strict=True)
    ]
    # Back to where the params lie, so that they can be compared with the pipeline's without moving anything.
    grads = [g if home is None else jax.device_put(g, home) for g, home in zip(grads, homes, strict=True)]
    return loss, jax.tree.unflatten(structure, grads)


def _whole_loss(module: PipelineModule, num_data_ranks: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The function that is differentiated; it holds no reference to the module, which is the key of a weak dict."""
    entries, owners, loss_fn = _entries(module), module.owners, module.loss_fn

    def whole_loss(
        trained: Leaves, layers: Params, inputs: Tree, labels: Tree, key: Key | None
    ) -> tuple[jax.Array, jax.Array]:
        leaves, structure = jax.tree.flatten(layers)

        def part(_: None, number: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
            m, rank = number // num_data_ranks, number % num_data_ranks
            # Cast in here, so that the gradients of bfloat16 params are added up in float32.
            cast = [a if w is None else w.astype(a.dtype) for a, w in zip(leaves, trained, strict=True)]

            def rows(leaf: jax.Array) -> jax.Array:
                count = leaf.shape[1] // num_data_ranks
                return jax.lax.dynamic_slice_in_dim(leaf[m], rank * count, count)

            part_key = None if key is None else keys.micro_batch_key(key, m, rank)
            x, y = jax.tree.map(rows, (inputs, labels))
            out = _forward(entries, owners, jax.tree.unflatten(structure, cast), x, part_key, True)
            return None, _total_and_weight(out if loss_fn is None else loss_fn(out, y))

        count = jax.tree.leaves(inputs)[0].shape[0] * num_data_ranks
        # In reverse, so that the derivative, which goes the other way, adds up from the first micro-batch to the last.
        _, (totals, weights) = jax.lax.scan(part, None, jnp.arange(count, dtype=jnp.int32), reverse=True)
        total, weight = totals.sum(), weights.sum()
        return jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight)), weight

    return whole_loss


def _forward(
    entries: Sequence[BoundLayer],
    owners: Sequence[int],
    layers: Sequence[Params],
    x: Tree,
    key: Key | None,
    train: bool,
) -> Tree:
    for index, layer in enumerate(entries):
        layer_key = None if key is None else keys.layer_key(key, index)
        x = layer.apply(layers[owners[index]], x, layer_key, train)
    return x


def _entries(module: PipelineModule) -> tuple[BoundLayer, ...]:
    if module not in _bound:
        _bound[module] = tuple(bind_alone(entry, index) for index, entry in enumerate(module.entries))
    return _bound[module]


def _total_and_weight(result: Any) -> tuple[jax.Array, jax.Array]:
    """What is added up of one result of `loss_fn`; metrics beside it do not count."""
    if isinstance(result, Mapping):
        result = result["loss"]
    elif isinstance(result, (tuple, list)):
        result, _ = result
    total, weight = (result.total, result.weight) if isinstance(result, Weighted) else (result, 1)
    total = _wide(jnp.asarray(total))
    return total, jnp.asarray(weight, total.dtype)


def _wide(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float32) if a.dtype.itemsize < 4 else a.astype(a.dtype)
