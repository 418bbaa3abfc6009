"""Small models for the contract suite. Distinct weights per layer, distinct micro-batches, no symmetric loss."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxpipe

VOCAB, WIDTH, LENGTH, ROWS = 11, 8, 5, 4


class Block(nnx.Module):
    """Residual MLP with dropout."""

    def __init__(self, width: int, rate: float = 0.2, *, rngs: nnx.Rngs):
        dtype = jnp.zeros(()).dtype  # float64 in the 64-bit tests
        self.up = nnx.Linear(width, 2 * width, rngs=rngs, param_dtype=dtype)
        self.down = nnx.Linear(2 * width, width, rngs=rngs, param_dtype=dtype)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.down(jnp.tanh(self.up(x))))


class Embedding(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        dtype = jnp.zeros(()).dtype
        self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, WIDTH), dtype))

    def __call__(self, ids):
        return self.table[...][ids]

    def attend(self, x):
        return x @ self.table[...].T


class LinenHead(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(VOCAB, dtype=x.dtype, param_dtype=x.dtype)(x)


def _scale_init(key, x):
    return {"scale": 1 + 0.1 * jax.random.normal(key, (WIDTH,), jnp.zeros(()).dtype)}


def _scale_apply(params, x):
    return x * jnp.broadcast_to(params["scale"], x.shape)


SCALE = jaxpipe.Layer(_scale_init, _scale_apply, "Scale")


def cross_entropy(logits, labels):
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs, labels[..., None], -1).mean()


def masked_cross_entropy(logits, labels):
    """Labels below 3 do not count."""
    logs = jax.nn.log_softmax(logits)
    each = -jnp.take_along_axis(logs, labels[..., None], -1)[..., 0]
    mask = (labels >= 3).astype(each.dtype)
    return jaxpipe.Weighted((each * mask).sum(), mask.sum())


def tied(partition="uniform", loss=cross_entropy, num_blocks=6):
    """Embedding, blocks, one odd layer, head tied to the embedding: first, middle and last stages differ."""
    layers = [
        jaxpipe.TiedLayerSpec("embedding", Embedding),
        *[jaxpipe.LayerSpec(Block, WIDTH) for _ in range(num_blocks)],
        SCALE,
        jaxpipe.TiedLayerSpec("embedding", Embedding, forward_fn=lambda module, x: module.attend(x)),
    ]
    return jaxpipe.PipelineModule(layers, loss, partition_method=partition)


def untied(partition="uniform", loss=masked_cross_entropy):
    """nnx embedding, blocks with a parameterless layer and odd layers among them, linen head."""
    layers = [
        jaxpipe.LayerSpec(Embedding),
        jaxpipe.LayerSpec(Block, WIDTH),
        jnp.tanh,
        jaxpipe.LayerSpec(Block, WIDTH),
        jaxpipe.LayerSpec(Block, WIDTH),
        SCALE,
        jaxpipe.LayerSpec(Block, WIDTH, 0.4),
        jaxpipe.LayerSpec(Block, WIDTH),
        jaxpipe.LayerSpec(LinenHead),
    ]
    return jaxpipe.PipelineModule(layers, loss, partition_method=partition)


def _dense(size_in, size_out):
    def init(key, x):
        return {
            "w": jax.random.normal(key, (size_in, size_out), jnp.zeros(()).dtype) / size_in**0.5,
            "unused": jnp.ones((3,), jnp.int32),
        }

    return jaxpipe.Layer(init, lambda params, x: {**x, "h": jnp.tanh(x["h"] @ params["w"])}, f"Dense{size_out}")


def mixed(partition="uniform", loss=masked_cross_entropy):
    """Every boundary differs: dicts with floats, integers, booleans and None, of changing widths; noise from the key."""

    def start(ids):
        return {
            "h": jax.nn.one_hot(ids, WIDTH, dtype=jnp.zeros(()).dtype),
            "ids": ids,
            "none": None,
            "even": ids % 2 == 0,
        }

    def noise_apply(params, x, *, key, train):
        if key is None or not train:
            return x
        return {**x, "h": x["h"] * jax.random.bernoulli(key, 0.9, x["h"].shape).astype(x["h"].dtype)}

    def gate(x):
        return {**x, "h": jnp.where(x["even"][..., None], x["h"], 0.5 * x["h"]), "skip": x["h"][..., :2]}

    def head(x):
        return x["h"].at[..., :2].add(x["skip"]).at[..., 0].add(0.1 * x["ids"].astype(x["h"].dtype))

    layers = [
        start,
        _dense(WIDTH, 6),
        gate,
        jaxpipe.Layer(lambda key, x: {}, noise_apply, "Noise"),
        _dense(6, 12),
        _dense(12, 12),
        _dense(12, 12),
        _dense(12, VOCAB),
        head,
    ]
    return jaxpipe.PipelineModule(layers, loss, partition_method=partition)


MODELS = {"tied": tied, "untied": untied, "mixed": mixed}


def make_batch(num_micro_batches, rows=ROWS, length=LENGTH, seed=0):
    """Inputs and labels [M, B, L], every micro-batch different."""
    rng = np.random.default_rng(seed)
    shape = (num_micro_batches, rows, length)
    return rng.integers(0, VOCAB, shape), rng.integers(0, VOCAB, shape)
