"""What the benchmark runs: one transformer, as a pipeline, as a plain loop on one device, and as GPipe by autodiff.

Shapes: M micro-batches, B rows, L length, D width, N layers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import SCOPE

import jaxpipe

P = jax.sharding.PartitionSpec
POLICY = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# Name in the report -> what `Pipeline(remat=...)` takes.
REMATS: dict[str, Any] = {"layer": "layer", "none": "none", "dots": POLICY}


@dataclass(frozen=True)
class Size:
    """The model and one micro-batch of it."""

    layers: int = 8
    width: int = 256
    heads: int = 4
    length: int = 128
    rows: int = 4

    @property
    def micro_batch(self) -> tuple[int, int, int]:
        return self.rows, self.length, self.width


def init_layer(size: Size, key: jax.Array, x: Any = None) -> dict[str, jax.Array]:
    """Weights of one layer; they do not depend on the shape of `x`."""
    del x
    width, keys = size.width, jax.random.split(key, 4)

    def dense(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return jax.random.normal(key, shape) * shape[0] ** -0.5

    return {
        "qkv": dense(keys[0], (width, 3 * width)),
        "out": dense(keys[1], (width, width)),
        "up": dense(keys[2], (width, 4 * width)),
        "down": dense(keys[3], (4 * width, width)),
        "scale_1": jnp.ones(width),
        "scale_2": jnp.ones(width),
    }


@jax.named_scope(SCOPE)
def apply_layer(size: Size, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A pre-norm transformer block, [B, L, D] -> [B, L, D]: causal attention, then an MLP four times as wide."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    rows, length, width = x.shape
    heads = (rows, length, size.heads, width // size.heads)
    qkv = jnp.split(norm(x, params["scale_1"]) @ params["qkv"], 3, axis=-1)
    query, key, value = (part.reshape(heads).swapaxes(1, 2) for part in qkv)
    scores = query @ key.swapaxes(2, 3) * heads[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9))
    x = x + (weights @ value).swapaxes(1, 2).reshape(x.shape) @ params["out"]
    return x + jax.nn.gelu(norm(x, params["scale_2"]) @ params["up"]) @ params["down"]


def loss_fn(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.square(outputs - labels).mean()


def make_module(size: Size) -> jaxpipe.PipelineModule:
    """The model as a list of like layers, cut evenly."""
    block = jaxpipe.Layer(functools.partial(init_layer, size), functools.partial(apply_layer, size), "Block")
    return jaxpipe.PipelineModule([block] * size.layers, loss_fn, partition_method="uniform")


def make_batch(size: Size, num_micro_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels [M, B, L, D]: numbers, not tokens, since an embedding would be a stage unlike the others."""
    rng = np.random.default_rng(0)
    shape = (num_micro_batches, *size.micro_batch)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def make_layers(size: Size) -> list[dict[str, np.ndarray]]:
    """Weights per layer, on the host: every contestant starts from them."""
    keys = jax.random.split(jax.random.key(0), size.layers)
    return jax.device_get([init_layer(size, key) for key in keys])


# ------------------------------------------------------------------------------------------------- one device, plain


def _layer_of(size: Size, remat: str) -> Callable[..., jax.Array]:
    layer = functools.partial(apply_layer, size)
    if remat == "none":
        return layer
    # prevent_cse=False: inside a scan nothing can be merged across, and the barrier would cost.
    return jax.checkpoint(layer, prevent_cse=False, policy=POLICY if remat == "dots" else None)


def _run_layers(layer: Callable[..., jax.Array], params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, held: (layer(held, x), None), x, params)[0]


def plain_train(size: Size, remat: str) -> Callable[..., Any]:
    """`step(params, inputs, labels) -> (loss, grads)`: micro-batches one after the other, gradients accumulated.

    Params have a leading dim of N.
    """
    layer = _layer_of(size, remat)

    def step(params: Any, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        def one(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return loss_fn(_run_layers(layer, params, x), y)

        def body(carry: Any, batch: Any) -> tuple[Any, None]:
            loss, grads = jax.value_and_grad(one)(params, *batch)
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(body, start, (inputs, labels))
        return jax.tree.map(lambda a: a / inputs.shape[0], total)

    return jax.jit(step)


def plain_evaluate(size: Size) -> Callable[..., jax.Array]:
    """`evaluate(params, inputs, labels) -> loss`: micro-batches one after the other, forward only."""
    layer = functools.partial(apply_layer, size)

    def evaluate(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        def body(total: jax.Array, batch: Any) -> tuple[jax.Array, None]:
            return total + loss_fn(_run_layers(layer, params, batch[0]), batch[1]), None

        return jax.lax.scan(body, jnp.zeros(()), (inputs, labels))[0] / inputs.shape[0]

    return jax.jit(evaluate)


# --------------------------------------------------------------------------------------------- GPipe by autodiff


def autodiff_gpipe(size: Size, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """The usual pipeline in JAX: a scan over M + S - 1 forward ticks, and `jax.grad` through it. Checkpointed layers.

    `step(params, inputs, labels) -> (loss, grads)`, params with leading dims [S, N / S]. Every tick computes on every
    rank, in the bubble on zeros.
    """
    num_stages = mesh.shape["pipe"]
    layer = _layer_of(size, "layer")
    edges = [(rank, rank + 1) for rank in range(num_stages - 1)]

    def one_rank(params: Any, rank: jax.Array, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        num_micro_batches, rank = inputs.shape[0], rank[0]

        def loss(params: Any) -> jax.Array:
            def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
                arrived, total = carry
                first = jnp.minimum(t, num_micro_batches - 1)
                x = jnp.where(rank == 0, inputs[first], arrived)
                y = _run_layers(layer, params, x)
                done = t - (num_stages - 1)
                here = loss_fn(y, labels[jnp.clip(done, 0, num_micro_batches - 1)])
                counts = (rank == num_stages - 1) & (done >= 0)
                return (jax.lax.ppermute(y, "pipe", edges), total + jnp.where(counts, here, 0.0)), None

            ticks = jnp.arange(num_micro_batches + num_stages - 1)
            start = jnp.zeros(inputs.shape[1:], inputs.dtype), jnp.zeros(())
            return jax.lax.scan(tick, start, ticks)[0][1] / num_micro_batches

        # The sum of the ranks' losses is differentiated, because transposed permutes carry gradients between ranks.
        value, grads = jax.value_and_grad(loss)(jax.tree.map(lambda a: a[0], params))
        return jax.lax.psum(value, "pipe"), jax.tree.map(lambda a: a[None], grads)

    mapped = jax.shard_map(
        one_rank,
        mesh=mesh,
        in_specs=(P("pipe"), P("pipe"), P(), P()),
        out_specs=(P(), P("pipe")),
        check_vma=False,  # with varying axes unchecked, the psum after the derivative is the only one
    )
    return jax.jit(lambda params, inputs, labels: mapped(params, jnp.arange(num_stages), inputs, labels))
