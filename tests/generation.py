"""A small causal model with caches, and generation by a loop over whole sequences on one device, without any cache."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.executor.reference import forward

VOCAB, WIDTH, HEADS, MOST = 13, 8, 2, 12


def _floats(key, *shape):
    return jax.random.normal(key, shape, jnp.zeros(()).dtype)


def _attention_init(key, x):
    one, two, three = jax.random.split(key, 3)
    return {
        "qkv": _floats(one, WIDTH, 3 * WIDTH),
        "out": _floats(two, WIDTH, WIDTH) / 2,
        "mlp": _floats(three, WIDTH, WIDTH) / 2,
    }


def attention(params, x, *, cache=None, position=None):
    rows, count, _ = x.shape
    query, key, value = jnp.split(x @ params["qkv"], 3, axis=-1)
    if cache is not None:
        key, value = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, axis=1)
            for old, new in zip(cache, (key, value), strict=True)
        )
        cache = key, value
    start = 0 if position is None else position
    query, key, value = (a.reshape(rows, -1, HEADS, WIDTH // HEADS) for a in (query, key, value))
    seen = jnp.arange(key.shape[1])[None] <= start + jnp.arange(count)[:, None]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, jnp.asarray(-1e9, scores.dtype)))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
    x = x + mixed @ params["out"]
    x = x + jnp.tanh(x @ params["mlp"])
    return x if cache is None else (x, cache)


def _empty(x, length):
    if length > MOST:
        raise ValueError(f"this layer has room for {MOST} positions, not for {length}")
    return jnp.zeros((x.shape[0], length, WIDTH), x.dtype), jnp.zeros((x.shape[0], length, WIDTH), x.dtype)


def _embed(params, ids, *, position=None):
    start = 0 if position is None else position
    places = start + jnp.arange(ids.shape[1])
    return params["table"][ids] + params["place"][places][None]


EMBED = jaxpipe.Layer(
    lambda key, x: {"table": _floats(key, VOCAB, WIDTH), "place": _floats(jax.random.fold_in(key, 1), MOST, WIDTH)},
    _embed,
    "Embed",
)
ATTENTION = jaxpipe.Layer(_attention_init, attention, "Attention", init_cache=_empty)
SCALE = jaxpipe.Layer(lambda key, x: {"scale": 1 + _floats(key) / 9}, lambda params, x: x * params["scale"], "Scale")


def _placed(params, x, *, position=None):
    """Every position is turned in another way, so a layer that is told a wrong one gives other tokens."""
    places = jnp.arange(x.shape[1]) + (0 if position is None else position)
    return x * jnp.cos(places[None, :, None] * jnp.arange(1, 1 + WIDTH)[None, None]).astype(x.dtype)


PLACED = jaxpipe.Layer(lambda key, x: {}, _placed, "Placed")
HEAD = jaxpipe.Layer(lambda key, x: {"w": _floats(key, WIDTH, VOCAB)}, lambda params, x: x @ params["w"], "Head")


def causal(partition="uniform"):
    """Like layers in runs of two lengths, odd ones among them, and a head behind the last cache."""
    layers = [EMBED, ATTENTION, ATTENTION, SCALE, ATTENTION, PLACED, HEAD]
    return jaxpipe.PipelineModule(layers, partition_method=partition)


def prompts(rows, length=4, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def by_hand(module, layers, ids, new, choose=None, stop=None, compute_dtype=None, layer_state=None):
    """The whole sequences, each token from a run of the whole model on all tokens before it."""
    layers = jax.device_get(layers)
    run = jax.jit(lambda ids: forward(module, layers, ids, layer_state=layer_state, compute_dtype=compute_dtype)[:, -1])
    ids, first = np.asarray(ids), np.shape(ids)[1]
    for number in range(new):
        logits = run(ids)
        tokens = np.asarray(logits.argmax(-1) if choose is None else choose(logits, number))
        if stop is not None:
            ended = (ids[:, first:] == stop).any(axis=1)
            tokens = np.where(ended, stop, tokens)
        ids = np.concatenate([ids, tokens[:, None]], axis=1)
    return ids
