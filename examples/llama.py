"""Llama as a list of layers, with the weights of a Hugging Face checkpoint: grouped-query attention, SwiGLU, RMS norms,
rotary positions (also those of Llama 3).

Shapes: B rows, L tokens of a row, D width, H size of a head. https://huggingface.co/docs/transformers/model_doc/llama
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxpipe

Tensors = dict[str, np.ndarray]


class Embedding(nnx.Module):
    """Tokens to vectors, and (where a model ties them) vectors back to logits."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs):
        self.tokens = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocabulary, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L] tokens -> [B, L, D]."""
        return self.tokens[...][x]

    def attend(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, vocabulary] logits."""
        return x @ self.tokens[...].T


class Block(nnx.Module):
    """A pre-norm block.

    Args:
      frequencies: of the rotary positions, radians per token, H / 2 of them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_heads: int,
        head_size: int,
        inner: int,
        epsilon: float,
        frequencies: tuple[float, ...],
        *,
        rngs: nnx.Rngs,
    ):
        def linear(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=False, rngs=rngs)

        self.head_size, self.frequencies = head_size, frequencies
        self.norm_1 = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.query, self.key = linear(width, heads * head_size), linear(width, key_heads * head_size)
        self.value, self.attention_out = linear(width, key_heads * head_size), linear(heads * head_size, width)
        self.norm_2 = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.gate, self.up, self.down = linear(width, inner), linear(width, inner), linear(inner, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        normed = self.norm_1(x)
        query, key, value = (
            projection(normed).reshape(*x.shape[:2], -1, self.head_size)
            for projection in (self.query, self.key, self.value)
        )
        mixed = jax.nn.dot_product_attention(self.rotate(query), self.rotate(key), value, is_causal=True)
        x = x + self.attention_out(mixed.reshape(*x.shape[:2], -1))
        normed = self.norm_2(x)
        return x + self.down(nnx.silu(self.gate(normed)) * self.up(normed))

    def rotate(self, x: jax.Array) -> jax.Array:
        """[B, L, heads, H], each pair (i, i + H / 2) turned by position times frequency i."""
        angle = jnp.arange(x.shape[1])[:, None] * jnp.asarray(self.frequencies, x.dtype)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        left, right = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def rotary_frequencies(config: dict[str, Any], head_size: int) -> tuple[float, ...]:
    """Radians per token; older checkpoints have them in `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = [rope["rope_theta"] ** (-2 * i / head_size) for i in range(head_size // 2)]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return tuple(base)
    if kind != "llama3":
        raise SystemExit(f"This example has rotary positions of the kinds 'default' and 'llama3', not {kind!r}.")

    def stretched(frequency: float) -> float:
        """Slow ones are stretched by the factor, fast ones stay, those between change over smoothly."""
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = min(1.0, max(0.0, (turns - low) / (high - low)))
        return keep * frequency + (1 - keep) * frequency / rope["factor"]

    return tuple(map(stretched, base))


def make_layers(config: dict[str, Any]) -> list[Any]:
    """The layers of a model with this `config.json`."""
    for name, value in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if config.get(name, value) != value:
            raise SystemExit(f"This example has Llama with {name}={value!r}; the checkpoint has {config[name]!r}.")
    width, heads, epsilon = config["hidden_size"], config["num_attention_heads"], config["rms_norm_eps"]
    key_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or width // heads
    frequencies = rotary_frequencies(config, head_size)
    block = width, heads, key_heads, head_size, config["intermediate_size"], epsilon, frequencies
    vocabulary = config["vocab_size"]
    if config.get("tie_word_embeddings"):
        embedding: Any = jaxpipe.TiedLayerSpec("embedding", Embedding, vocabulary, width)
        head: Any = jaxpipe.TiedLayerSpec("embedding", Embedding, vocabulary, width, forward_fn=Embedding.attend)
    else:
        embedding = jaxpipe.LayerSpec(Embedding, vocabulary, width)
        head = jaxpipe.LayerSpec(nnx.Linear, width, vocabulary, use_bias=False)
    blocks = [jaxpipe.LayerSpec(Block, *block) for _ in range(config["num_hidden_layers"])]
    return [embedding, *blocks, jaxpipe.LayerSpec(nnx.RMSNorm, width, epsilon=epsilon), head]


def convert(tensors: Tensors, config: dict[str, Any]) -> list[Any]:
    """Per layer, its params, from the tensors of the checkpoint."""

    def linear(name: str) -> dict[str, Any]:
        return {"kernel": tensors[f"{name}.weight"].T}

    def norm(name: str) -> dict[str, Any]:
        return {"scale": tensors[f"{name}.weight"]}

    def block(layer: str) -> dict[str, Any]:
        return {
            "norm_1": norm(f"{layer}.input_layernorm"),
            "query": linear(f"{layer}.self_attn.q_proj"),
            "key": linear(f"{layer}.self_attn.k_proj"),
            "value": linear(f"{layer}.self_attn.v_proj"),
            "attention_out": linear(f"{layer}.self_attn.o_proj"),
            "norm_2": norm(f"{layer}.post_attention_layernorm"),
            "gate": linear(f"{layer}.mlp.gate_proj"),
            "up": linear(f"{layer}.mlp.up_proj"),
            "down": linear(f"{layer}.mlp.down_proj"),
        }

    blocks = [block(f"model.layers.{i}") for i in range(config["num_hidden_layers"])]
    head = {} if config.get("tie_word_embeddings") else linear("lm_head")
    return [{"tokens": tensors["model.embed_tokens.weight"]}, *blocks, norm("model.norm"), head]
