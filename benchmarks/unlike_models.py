"""Models whose stages have little in common, of `jaxpipe.Layer`s alone: ResNet-18, vision and text joined, a GPT."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxpipe


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs, labels[..., None], -1).mean()


# ---------------------------------------------------------------------------------------------------------------- ResNet


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _basic_block(size_in: int, size_out: int, stride: int) -> jaxpipe.Layer:
    def init(key: jax.Array, x: Any) -> Any:
        keys = jax.random.split(key, 3)
        params = {
            "first": _normal(keys[0], 3, 3, size_in, size_out),
            "second": _normal(keys[1], 3, 3, size_out, size_out),
            "gains": jnp.ones((2, size_out)),
        }
        if size_in != size_out:
            params["across"] = _normal(keys[2], 1, 1, size_in, size_out)
        return params

    def apply(p: Any, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(_norm(_conv(x, p["first"], stride), p["gains"][0]))
        y = _norm(_conv(y, p["second"]), p["gains"][1])
        return jax.nn.relu(y + (_conv(x, p["across"], stride) if "across" in p else x))

    return jaxpipe.Layer(init, apply, f"Block{size_out}")


def resnet18(width: int = 64, classes: int = 10) -> list[Any]:
    """Images [B, H, W, 3] to logits; layer norms over channels in the place of batch norms, which have a state."""
    stem = jaxpipe.Layer(
        lambda key, x: {"kernel": _normal(key, 3, 3, 3, width)},
        lambda p, x: jax.nn.relu(_conv(x, p["kernel"])),
        "Stem",
    )
    layers, size = [stem], width
    for number, wide in enumerate([width, 2 * width, 4 * width, 8 * width]):
        layers += [_basic_block(size, wide, 1 if number == 0 else 2), _basic_block(wide, wide, 1)]
        size = wide
    head = jaxpipe.Layer(
        lambda key, x: {"w": _normal(key, size, classes), "b": jnp.zeros(classes)},
        lambda p, x: x.mean((1, 2)) @ p["w"] + p["b"],
        "Head",
    )
    return [*layers, head]


# ----------------------------------------------------------------------------------------------------------- transformers


def _attention(p: Any, x: jax.Array, heads: int, causal: bool) -> jax.Array:
    rows, length, width = x.shape
    q, k, v = (a.reshape(rows, length, heads, -1).swapaxes(1, 2) for a in jnp.split(x @ p["qkv"], 3, -1))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(width / heads)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), v).swapaxes(1, 2).reshape(x.shape) @ p["out"]


def _block(width: int, heads: int, causal: bool, stream: str | None = None, name: str = "Block") -> jaxpipe.Layer:
    """A transformer block, on `x` or on `x[stream]`."""

    def init(key: jax.Array, x: Any) -> Any:
        keys = jax.random.split(key, 4)
        return {
            "qkv": _normal(keys[0], width, 3 * width),
            "out": _normal(keys[1], width, width),
            "up": _normal(keys[2], width, 4 * width),
            "down": _normal(keys[3], 4 * width, width),
            "gains": jnp.ones((2, width)),
        }

    def run(p: Any, x: jax.Array) -> jax.Array:
        x = x + _attention(p, _norm(x, p["gains"][0]), heads, causal)
        return x + jax.nn.gelu(_norm(x, p["gains"][1]) @ p["up"]) @ p["down"]

    def apply(p: Any, x: Any) -> Any:
        return run(p, x) if stream is None else {**x, stream: run(p, x[stream])}

    return jaxpipe.Layer(init, apply, name)


def _embedding(words: int, width: int, length: int, of: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> Any:
    return jaxpipe.Layer(
        lambda key, x: {"words": _normal(key, words, width) * math.sqrt(words), "places": _normal(key, length, width)},
        lambda p, x: put(x, p["words"][of(x)] + p["places"]),
        "Embedding",
    )


def gpt(words: int = 8192, width: int = 256, blocks: int = 8, length: int = 64, heads: int = 4) -> list[Any]:
    """Tokens [B, T] to logits; embedding and head are not tied."""
    head = jaxpipe.Layer(
        lambda key, x: {"gain": jnp.ones(width), "w": _normal(key, width, words)},
        lambda p, x: _norm(x, p["gain"]) @ p["w"],
        "Head",
    )
    embedding = _embedding(words, width, length, lambda ids: ids, lambda ids, x: x)
    return [embedding, *[_block(width, heads, True) for _ in range(blocks)], head]


def vision_text(
    size: int = 32,
    wide: int = 256,
    narrow: int = 192,
    words: int = 4096,
    length: int = 32,
    blocks: tuple[int, ...] = (6, 6, 2),
) -> list[Any]:
    """{"image": [B, size, size, 3], "text": [B, T]} to the logits of the next words: an encoder of images, one of texts
    that is narrower, and blocks over both."""
    patch = 4
    places = (size // patch) ** 2

    def patches(p: Any, x: Any) -> Any:
        image = x["image"]
        cut = image.reshape(-1, size // patch, patch, size // patch, patch, 3).swapaxes(2, 3)
        return {"image": cut.reshape(-1, places, patch * patch * 3) @ p["w"] + p["places"], "text": x["text"]}

    look = jaxpipe.Layer(
        lambda key, x: {"w": _normal(key, patch * patch * 3, wide), "places": jnp.zeros((places, wide))},
        patches,
        "Patches",
    )
    read = _embedding(words, narrow, length, lambda x: x["text"], lambda x, text: {**x, "text": text})
    join = jaxpipe.Layer(
        lambda key, x: {"w": _normal(key, narrow, wide)},
        lambda p, x: jnp.concatenate([x["image"], x["text"] @ p["w"]], 1),
        "Join",
    )
    head = jaxpipe.Layer(
        lambda key, x: {"gain": jnp.ones(wide), "w": _normal(key, wide, words)},
        lambda p, x: _norm(x[:, places:], p["gain"]) @ p["w"],
        "Head",
    )
    see, understand, both = blocks
    return [
        look,
        *[_block(wide, 4, False, "image", "Vision") for _ in range(see)],
        read,
        *[_block(narrow, 4, True, "text", "Text") for _ in range(understand)],
        join,
        *[_block(wide, 4, False, None, "Both") for _ in range(both)],
        head,
    ]


def example(name: str, rows: int) -> tuple[Any, Any]:
    """Shapes of one micro-batch (inputs, labels)."""
    integers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    if name == "resnet":
        return jax.ShapeDtypeStruct((rows, 32, 32, 3), jnp.float32), integers
    if name == "gpt":
        ids = jax.ShapeDtypeStruct((rows, 64), jnp.int32)
        return ids, ids
    text = jax.ShapeDtypeStruct((rows, 32), jnp.int32)
    return {"image": jax.ShapeDtypeStruct((rows, 32, 32, 3), jnp.float32), "text": text}, text


MODELS: dict[str, Callable[[], list[Any]]] = {"resnet": resnet18, "gpt": gpt, "vision_text": vision_text}
