"""A small GPT as a list of layers: an embedding, blocks, a norm, and a head that uses the embedding's weights again.

Shapes: B rows, L bytes of a row (the window), D width, V = 256 values of a byte.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxpipe

VOCABULARY = 256


class Embedding(nnx.Module):
    """Bytes to vectors, and vectors back to bytes: both ends of the model use one object, so the table exists once.

    The table is small (0.02) and scaled where it is used. Adam moves all weights at about the same speed, so the scales
    make the table move fast in proportion to its values, which is what training needs first.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (VOCABULARY, width)))
        self.scale = width**0.5

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L] bytes -> [B, L, D]."""
        return self.scale * self.table[...][x]

    def attend(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, V] logits of the next byte."""
        return 4.0 * x @ self.table[...].T


def rotate(x: jax.Array, places: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding of [B, L, heads, D / heads] at places [L]: https://arxiv.org/abs/2104.09864."""
    half = x.shape[-1] // 2
    places = jnp.arange(x.shape[1]) if places is None else places
    angle = places[:, None] / 1000 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


class Block(nnx.Module):
    """A pre-norm transformer block: causal attention, then an MLP, each added to its input.

    `init_cache` and the keywords `cache` and `position` are for generation: keys and values of the bytes before are kept.
    """

    def __init__(self, width: int, heads: int, num_blocks: int, dropout: float, *, rngs: nnx.Rngs):
        # The 2 * num_blocks branches add up on the residual path; smaller output weights keep its scale at the start.
        small = nnx.initializers.normal(0.02 / (2 * num_blocks) ** 0.5)
        self.heads, self.head_width = heads, width // heads
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, use_bias=False, kernel_init=small, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, kernel_init=small, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def init_cache(self, x: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        """Room for the keys and values of sequences of this length, each [B, length, heads, D / heads]."""
        empty = jnp.zeros((x.shape[0], length, self.heads, self.head_width), x.dtype)
        return empty, empty

    def __call__(self, x: jax.Array, cache=None, position: jax.Array | None = None):
        """[B, L, D] -> [B, L, D]; with a cache the pair of that and the cache, and L bytes that begin at `position`."""
        query, key, value = jnp.split(self.qkv(self.norm_1(x)), 3, axis=-1)
        query, key, value = (a.reshape(*x.shape[:2], self.heads, -1) for a in (query, key, value))
        places = jnp.arange(x.shape[1]) + (0 if position is None else position)
        query, key = rotate(query, places), rotate(key, places)
        if cache is not None:
            key, value = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(kept, new, position, axis=1)
                for kept, new in zip(cache, (key, value), strict=True)
            )
        causal = places[:, None] >= jnp.arange(key.shape[1])
        mixed = jax.nn.dot_product_attention(query, key, value, mask=causal[None, None])
        x = x + self.dropout(self.attention_out(mixed.reshape(x.shape)))
        x = x + self.dropout(self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm_2(x)))))
        return x if cache is None else (x, cache)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over [B, L], in nats per byte."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_gpt(*, width: int, num_blocks: int, heads: int, dropout: float) -> jaxpipe.PipelineModule:
    """The model. Nothing is built here: a spec is built on the rank that holds its stage."""
    layers = [
        jaxpipe.TiedLayerSpec("embedding", Embedding, width),
        *(jaxpipe.LayerSpec(Block, width, heads, num_blocks, dropout) for _ in range(num_blocks)),
        jaxpipe.LayerSpec(nnx.LayerNorm, width),
        jaxpipe.TiedLayerSpec("embedding", Embedding, width, forward_fn=Embedding.attend),
    ]
    return jaxpipe.PipelineModule(layers, loss_fn=cross_entropy)
