"""A GPT for compilers: nothing of it is ever made, so it may be of any size. L is the length of a sequence.

Weights are in one dtype; products, norms and softmax are written as one would for an accelerator.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import jaxpipe

# Products are cut by columns, then by rows, so that one sum over "model" follows each pair.
TENSOR = [("qkv", P(None, "model")), ("up", P(None, "model")), ("out", P("model", None)), ("down", P("model", None))]


@dataclass(frozen=True)
class Gpt:
    """The model, and how many rows a micro-batch has on each data rank."""

    blocks: int = 16
    width: int = 1024
    heads: int = 16
    vocabulary: int = 32_000
    length: int = 1024
    rows: int = 4
    dtype: Any = jnp.bfloat16
    by_head: bool = False  # the columns of qkv are ordered by head first, as a cut over heads needs it

    def example(self, data: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """One micro-batch with the rows of all data ranks."""
        ids = jax.ShapeDtypeStruct((self.rows * data, self.length), jnp.int32)
        return ids, ids

    def module(self, **options: Any) -> jaxpipe.PipelineModule:
        """Embedding, blocks, head; the loss is the cross entropy in float32."""
        embedding = jaxpipe.Layer(
            lambda key, x: {"table": self._matrix(key, self.vocabulary, self.width)},
            lambda p, x: p["table"][x],
            "embedding",
        )
        head = jaxpipe.Layer(
            lambda key, x: {"kernel": self._matrix(key, self.width, self.vocabulary)},
            lambda p, x: x @ p["kernel"],
            "head",
        )
        block = jaxpipe.Layer(self._init_block, self._block, "block")
        return jaxpipe.PipelineModule([embedding, *[block] * self.blocks, head], cross_entropy, **options)

    def _matrix(self, key: jax.Array, *shape: int) -> jax.Array:
        return (jax.random.normal(key, shape) * 0.02).astype(self.dtype)

    def _init_block(self, key: jax.Array, x: Any) -> dict[str, jax.Array]:
        width, keys = self.width, jax.random.split(key, 4)
        return {
            "qkv": self._matrix(keys[0], width, 3 * width),
            "out": self._matrix(keys[1], width, width),
            "up": self._matrix(keys[2], width, 4 * width),
            "down": self._matrix(keys[3], 4 * width, width),
            "scale_1": jnp.ones(width, self.dtype),
            "scale_2": jnp.ones(width, self.dtype),
        }

    def _block(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]: causal attention, then an MLP four times as wide."""
        rows, length, width = x.shape
        heads, size = (self.heads, 3) if self.by_head else (3, self.heads), width // self.heads
        both = (_norm(x, params["scale_1"]) @ params["qkv"]).reshape(rows, length, *heads, size)
        q, k, v = jnp.moveaxis(both, 3 if self.by_head else 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ params["out"]
        return x + jax.nn.gelu(_norm(x, params["scale_2"]) @ params["up"]) @ params["down"]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all tokens, in float32."""
    logits = logits.astype(jnp.float32)
    right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - right).mean()


def seven_billion() -> tuple[Any, ...]:
    """A model of 6.7 billion weights for `python -m jaxpipe plan` and `compile`: module, optimizer, example and config."""
    gpt = Gpt(blocks=32, width=4096, heads=32, length=2048, rows=1, dtype=jnp.float32, by_head=True)
    config = jaxpipe.Config(compute_dtype="bfloat16")
    return gpt.module(sharding=TENSOR), optax.adam(1e-4), gpt.example(1), config
