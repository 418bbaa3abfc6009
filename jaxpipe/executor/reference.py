"""The oracle: one device, one derivative of the whole loss, no schedule.

It shares with the pipeline what is agreed from outside: where a layer's weights and keys come from, and how one entry of
the list is called. It has its own reading of what `loss_fn` returns, calls every entry by itself, whether or not another
one is like it, and knows neither stages nor what a backward pass starts from.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.errors import LayerError
from jaxpipe.executor.one_device import computed_dtypes, run_layers
from jaxpipe.mesh import one_device_mesh
from jaxpipe.model import keys
from jaxpipe.model.abstract import on_one_device
from jaxpipe.model.layers import BoundLayer, bind_alone
from jaxpipe.model.loss import Weighted
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.precision import as_compute_dtype
from jaxpipe.processes.group import fetch
from jaxpipe.types import Key, Leaves, Params, Tree

# Per module: its entries, each bound by itself, and the compiled derivatives.
_bound: weakref.WeakKeyDictionary[PipelineModule, tuple[BoundLayer, ...]] = weakref.WeakKeyDictionary()
_compiled: weakref.WeakKeyDictionary[PipelineModule, dict[Hashable, Callable[..., Tree]]] = weakref.WeakKeyDictionary()


def forward(
    module: PipelineModule,
    layers: Sequence[Params],
    x: Tree,
    key: Key | None = None,
    train: bool = False,
    *,
    layer_state: Sequence[Tree] | None = None,
    compute_dtype: Any = None,
    float32_params: str | None = None,
) -> Tree:
    """The layers one after the other; `key` is that of the micro-batch, the rest is as for `value_and_grad`."""
    entries, owners, axes = _entries(module), module.owners, frozenset(module.axes)
    short = as_compute_dtype(compute_dtype)
    dtypes = tuple(computed_dtypes(layers, short, float32_params))
    states = _states(entries, layer_state)

    def run(layers: Sequence[Params], states: Sequence[Tree], x: Tree, key: Key | None) -> Tree:
        wanted = iter(dtypes)
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(next(wanted)), list(layers))
        with on_one_device(axes):
            return run_layers(entries, owners, cast, jax.tree.map(jnp.asarray, states), x, key, train, short)[0]

    if not axes:
        return run(layers, states, x, key)
    # What a layer says about an axis is for compiled programs only.
    known = _compiled.setdefault(module, {})
    return known.setdefault(("forward", train, axes, short, dtypes), jax.jit(run))(layers, states, x, key)


def value_and_grad(
    module: PipelineModule,
    layers: Sequence[Params],
    batch: tuple[Tree, Tree],
    key: jax.Array | int | None = None,
    *,
    num_data_ranks: int = 1,
    layer_state: Sequence[Tree] | None = None,
    compute_dtype: Any = None,
    float32_params: str | None = None,
) -> Any:
    """Loss and gradients, per layer, of a whole batch.

    It is `jax.value_and_grad` of one function, the mean over all micro-batches and data ranks with the means of the extra
    losses of layers added, so it needs the memory for the activations of all of them.

    Args:
      layers: per layer, its own params (as `Pipeline.to_layers` gives).
      batch: (inputs, labels) with leaves [M, B, ...].
      key: of the step, for dropout; None switches dropout off.
      num_data_ranks: rows of a micro-batch are cut into so many parts with dropout keys of their own. To what joins them by
        the axis "data", such as synchronised batch statistics, each is the only one: leave it 1 for such layers.
      layer_state: where layers have state, that of each layer, as `Engine.layer_state` gives it. On each data rank every
        micro-batch starts from what the one before has left; at the end floats are averaged over the data ranks, and the
        rest is that of the first one.
      compute_dtype: cast as a `Config` with it does; gradients are still those of `layers`, added up in float32.
      float32_params: as in `Config`.

    Returns:
      The loss (a scalar) and the gradients in the structure of `layers`, on the devices of `layers`. With several processes
      each has both on a device of its own. All of them call this together if arrays of JAX are among the arguments; with
      NumPy arrays and a seed each can call it by itself. With `layer_state` the new state of the layers comes third.
    """
    states = _states(_entries(module), layer_state)
    given: Tree = list(layers), batch, states, None if key is None or isinstance(key, int) else keys.as_key(key)
    homes: list[Any] = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(given[0])]
    if jax.process_count() > 1 and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given)):
        given, homes = fetch(given), [None] * len(homes)
    # Sharded params would bring their mesh along; the oracle is one device.
    device = jax.local_devices()[0]
    with _not_in_a_mesh(device, module.axes):
        layers, (inputs, labels), states, root = jax.device_put(given, device)
        root = keys.as_key(key) if root is None and key is not None else root
        known = _compiled.setdefault(module, {})
        short = as_compute_dtype(compute_dtype)
        dtypes = computed_dtypes(layers, short, float32_params)
        chosen = module.loss_fn, num_data_ranks, frozenset(module.axes), short, tuple(dtypes)
        if chosen not in known:
            known[chosen] = jax.jit(_loss_and_gradient(module, num_data_ranks, short, dtypes))
        leaves, structure = jax.tree.flatten(layers)
        trained = [_wide(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None for leaf in leaves]
        loss, found, after = known[chosen](trained, layers, states, inputs, labels, root)
        grads = [
            jnp.zeros_like(leaf) if grad is None else grad.astype(leaf.dtype)
            for leaf, grad in zip(leaves, found, strict=True)
        ]
    # Back to where the params lie, so that they can be compared with the pipeline's without moving anything.
    grads = [g if home is None else jax.device_put(g, home) for g, home in zip(grads, homes, strict=True)]
    found = jax.tree.unflatten(structure, grads)
    return (loss, found) if layer_state is None else (loss, found, after)


def _not_in_a_mesh(device: Any, axes: Iterable[str]) -> contextlib.AbstractContextManager[Any]:
    """Takes off the mesh that a caller has set: what is compiled inside runs on one device."""
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(one_device_mesh(device, axes))


def _loss_and_gradient(
    module: PipelineModule, num_data_ranks: int, short: str | None, dtypes: Sequence[Any]
) -> Callable[..., tuple[jax.Array, Leaves, Tree]]:
    """The objective of a batch, its gradient by `trained`, and the new state of the layers."""
    losses = _losses(module, num_data_ranks, short, dtypes)

    def loss_and_gradient(trained: Leaves, *others: Tree) -> tuple[jax.Array, Leaves, Tree]:
        def whole(trained: Leaves) -> tuple[jax.Array, tuple[jax.Array, bool, Tree]]:
            mean, weight, extra, has_extra, states = losses(trained, *others)
            return mean + extra if has_extra else mean, (weight, has_extra, states)

        loss, pullback, (weight, has_extra, states) = jax.vjp(whole, trained, has_aux=True)
        (grads,) = pullback(jnp.ones_like(loss))
        # Where nothing counts, the gradient of the mean may be 0 x infinity: it is left out as a whole.
        extra = jax.grad(lambda trained: losses(trained, *others)[2])
        rest = extra(trained) if has_extra else jax.tree.map(jnp.zeros_like, grads)
        grads = jax.tree.map(lambda grad, other: jnp.where(weight == 0, other, grad), grads, rest)
        return loss, grads, states

    return loss_and_gradient


def _losses(
    module: PipelineModule, num_data_ranks: int, short: str | None, dtypes: Sequence[Any]
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array, bool, Tree]]:
    """The function that is differentiated; it holds no reference to the module, which is the key of a weak dict.

    It returns the mean loss, the weight of all parts, the mean of the extra losses of layers, whether there are any, and
    the state of the layers afterwards.
    """
    entries, owners, loss_fn, axes = _entries(module), module.owners, module.loss_fn, frozenset(module.axes)

    def losses(
        trained: Leaves, layers: Params, states: Tree, inputs: Tree, labels: Tree, key: Key | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, bool, Tree]:
        leaves, structure = jax.tree.flatten(layers)
        has_extra = False

        def run(number: jax.Array, states: Tree) -> tuple[Tree, Tree, list[jax.Array], Tree]:
            """For one micro-batch on one data rank: outputs, labels, extra losses, and the state after it."""
            m, rank = number // num_data_ranks, number % num_data_ranks
            # Cast in here, so that the gradients of bfloat16 params are added up in float32.
            cast = [a if w is None else w.astype(d) for a, w, d in zip(leaves, trained, dtypes, strict=True)]

            def rows(leaf: jax.Array) -> jax.Array:
                count = leaf.shape[1] // num_data_ranks
                return jax.lax.dynamic_slice_in_dim(leaf[m], rank * count, count)

            part_key = None if key is None else keys.micro_batch_key(key, m, rank)
            x, y = jax.tree.map(rows, (inputs, labels))
            with on_one_device(axes):
                held = jax.tree.unflatten(structure, cast)
                out, extra, states = run_layers(entries, owners, held, states, x, part_key, True, short)
            return out, y, extra, states

        def part(_: None, each: tuple[jax.Array, Tree]) -> tuple[None, tuple[jax.Array, jax.Array, jax.Array]]:
            nonlocal has_extra
            out, y, extra, _after = run(*each)
            has_extra = bool(extra)
            result = out if loss_fn is None else loss_fn(out, y)
            total, weight = _total_and_weight(result)
            return None, (total, weight, sum((a.astype(total.dtype) for a in extra), jnp.zeros_like(total)))

        def advance(before: list[Tree], m: jax.Array) -> tuple[list[Tree], Tree]:
            after = [run(m * num_data_ranks + rank, state)[3] for rank, state in enumerate(before)]
            return after, jax.tree.map(lambda *ranks: jnp.stack(ranks), *before)

        num_micro_batches = jax.tree.leaves(inputs)[0].shape[0]
        befores, after = states, states
        if jax.tree.leaves(states):
            # What each micro-batch starts from is found first. To the derivative it is a constant.
            order = jnp.arange(num_micro_batches, dtype=jnp.int32)
            last, befores = jax.lax.scan(advance, [states] * num_data_ranks, order)
            befores = jax.tree.map(lambda a: jax.lax.stop_gradient(a.reshape(-1, *a.shape[2:])), befores)
            after = jax.tree.map(lambda *ranks: jax.lax.stop_gradient(_over_ranks(ranks)), *last)
        numbers = jnp.arange(num_micro_batches * num_data_ranks, dtype=jnp.int32)
        # In reverse, so that the derivative, which goes the other way, adds up from the first micro-batch to the last.
        _, (totals, weights, extras) = jax.lax.scan(part, None, (numbers, befores), reverse=True)
        total, weight = totals.sum(), weights.sum()
        mean = jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight))
        return mean, weight, extras.sum() / numbers.size, has_extra, after

    return losses


def _over_ranks(ranks: Sequence[jax.Array]) -> jax.Array:
    """What the state of several data ranks becomes."""
    if not jnp.issubdtype(ranks[0].dtype, jnp.inexact):
        return ranks[0]
    return (sum(map(_wide, ranks[1:]), _wide(ranks[0])) / len(ranks)).astype(ranks[0].dtype)


def _states(entries: Sequence[BoundLayer], given: Sequence[Tree] | None) -> list[Tree]:
    """The state of each layer, {} where none is given."""
    states = [{}] * len(entries) if given is None else list(given)
    if not isinstance(given, (list, tuple, type(None))) or len(states) != len(entries):
        what = f"a {type(given).__name__} of {len(states)}"
        raise LayerError(f"layer_state is {what}: expected a list of {len(entries)}, one per layer, {{}} for no state.")
    return states


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
