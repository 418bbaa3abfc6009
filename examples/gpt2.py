"""GPT-2 as a list of layers, with the weights of a Hugging Face checkpoint.

Shapes: B rows, L tokens of a row, D width. https://huggingface.co/docs/transformers/model_doc/gpt2
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxpipe

Tensors = dict[str, np.ndarray]


class Embedding(nnx.Module):
    """Tokens to vectors with their positions, and vectors back to logits of tokens: one table for both."""

    def __init__(self, vocabulary: int, positions: int, width: int, *, rngs: nnx.Rngs):
        self.tokens = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocabulary, width)))
        self.positions = nnx.Param(0.01 * jax.random.normal(rngs.params(), (positions, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L] tokens -> [B, L, D]."""
        return self.tokens[...][x] + self.positions[...][jnp.arange(x.shape[1])]

    def attend(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, vocabulary] logits."""
        return x @ self.tokens[...].T


class Block(nnx.Module):
    """A pre-norm block: causal attention, then an MLP."""

    def __init__(self, width: int, heads: int, inner: int, epsilon: float, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_1 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp_in = nnx.Linear(width, inner, rngs=rngs)
        self.mlp_out = nnx.Linear(inner, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        split = jnp.split(self.qkv(self.norm_1(x)), 3, axis=-1)
        query, key, value = (a.reshape(*x.shape[:2], self.heads, -1) for a in split)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.reshape(x.shape))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.norm_2(x)), approximate=True))


def make_layers(config: dict[str, Any]) -> list[Any]:
    """The layers of a model with this `config.json`."""
    supported = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise SystemExit(f"This example has GPT-2 with {name}={value!r}; the checkpoint has {config[name]!r}.")
    width, epsilon = config["n_embd"], config["layer_norm_epsilon"]
    embedding = config["vocab_size"], config["n_positions"], width
    block = width, config["n_head"], config.get("n_inner") or 4 * width, epsilon
    return [
        jaxpipe.TiedLayerSpec("embedding", Embedding, *embedding),
        *(jaxpipe.LayerSpec(Block, *block) for _ in range(config["n_layer"])),
        jaxpipe.LayerSpec(nnx.LayerNorm, width, epsilon=epsilon),
        jaxpipe.TiedLayerSpec("embedding", Embedding, *embedding, forward_fn=Embedding.attend),
    ]


def convert(tensors: Tensors, config: dict[str, Any]) -> list[Any]:
    """Per layer, its params, from the tensors of the checkpoint."""
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}

    def norm(name: str) -> dict[str, Any]:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def linear(name: str) -> dict[str, Any]:
        # GPT-2 stores [in, out], unlike a torch Linear.
        return {"kernel": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def block(h: str) -> dict[str, Any]:
        return {
            "norm_1": norm(f"{h}.ln_1"),
            "qkv": linear(f"{h}.attn.c_attn"),
            "attention_out": linear(f"{h}.attn.c_proj"),
            "norm_2": norm(f"{h}.ln_2"),
            "mlp_in": linear(f"{h}.mlp.c_fc"),
            "mlp_out": linear(f"{h}.mlp.c_proj"),
        }

    embedding = {"tokens": tensors["wte.weight"], "positions": tensors["wpe.weight"]}
    return [embedding, *(block(f"h.{i}") for i in range(config["n_layer"])), norm("ln_f"), {}]
