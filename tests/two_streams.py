"""Models with two streams: an encoder beside a decoder, and two towers whose rows are told apart by all rows of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpipe

VOCAB, WIDTH, SOURCE, TARGET, ROWS = 11, 6, 5, 4, 4


def _floats(key, *shape):
    return jax.random.normal(key, shape, jnp.zeros(()).dtype) / 2


def _attend(query, memory, weights, mask=None):
    q, k, v = query @ weights["q"], memory @ weights["k"], memory @ weights["v"]
    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    if mask is not None:
        scores = jnp.where(mask[None], scores, jnp.asarray(-1e9, scores.dtype))
    return query + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v)


def _weights(*names):
    def init(key, x):
        return {name: _floats(jax.random.fold_in(key, n), WIDTH, WIDTH) for n, name in enumerate(names)}

    return init


def _encoder(params, x):
    return {**x, "encoder": jnp.tanh(_attend(x["encoder"], x["encoder"], params))}


def _decoder(params, x):
    causal = jnp.tril(jnp.ones((TARGET, TARGET), bool))
    h = _attend(x["decoder"], x["decoder"], params["own"], causal)
    return {**x, "decoder": jnp.tanh(_attend(h, x["encoder"], params["cross"]))}


def _decoder_init(key, x):
    init = _weights("q", "k", "v")
    return {"own": init(jax.random.fold_in(key, 0), x), "cross": init(jax.random.fold_in(key, 1), x)}


TABLE = jaxpipe.Layer(lambda key, x: _floats(key, VOCAB, WIDTH), lambda table, x: x, "Table")


def _table():
    return TABLE


def _source(table, x):
    return {"encoder": table[x["source"]], "target": x["target"]}


def _target(table, x):
    return {"encoder": x["encoder"], "decoder": table[x["target"]]}


def _logits(table, x):
    return x["decoder"] @ table.T


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def encoder_decoder(partition="uniform"):
    """Nine layers: the table is used three times, in the first, in a middle and in the last one."""
    encoder = jaxpipe.Layer(_weights("q", "k", "v"), _encoder, "Encoder")
    decoder = jaxpipe.Layer(_decoder_init, _decoder, "Decoder")
    layers = [
        jaxpipe.TiedLayerSpec("table", _table, forward_fn=_source),
        *[encoder] * 3,
        jaxpipe.TiedLayerSpec("table", _table, forward_fn=_target),
        *[decoder] * 3,
        jaxpipe.TiedLayerSpec("table", _table, forward_fn=_logits),
    ]
    return jaxpipe.PipelineModule(layers, cross_entropy, partition_method=partition)


def translations(num_micro_batches, seed=0):
    rng = np.random.default_rng(seed)
    shape = num_micro_batches, ROWS
    source, target = rng.integers(0, VOCAB, (*shape, SOURCE)), rng.integers(0, VOCAB, (*shape, TARGET))
    return {"source": source, "target": target}, rng.integers(0, VOCAB, (*shape, TARGET))


def _tower(name):
    def apply(params, x):
        return {**x, name: x[name] + jnp.tanh(x[name] @ params["w"])}

    return jaxpipe.Layer(_weights("w"), apply, name)


def contrastive(towers, labels):
    """Which text belongs to a picture, among the texts of all data ranks, and the other way round; a mean over rows."""
    picture, text = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (towers["picture"], towers["text"]))
    rows = jax.lax.axis_index("data") * len(text) + jnp.arange(len(text))

    def one_way(mine, others):
        logits = 5 * mine @ jax.lax.all_gather(others, "data", tiled=True).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows)

    both = one_way(picture, text) + one_way(text, picture)
    return (both * labels).mean()


def two_towers(partition="uniform"):
    """Two towers of unlike depth, side by side, that nothing joins but the loss."""
    text, picture = _tower("text"), _tower("picture")
    return jaxpipe.PipelineModule([text, picture, picture, text, picture], contrastive, partition_method=partition)


def pairs(num_micro_batches, seed=0):
    rng = np.random.default_rng(seed)
    shape = num_micro_batches, ROWS
    made = {name: rng.normal(size=(*shape, WIDTH)).astype(np.float32) for name in ("picture", "text")}
    return made, rng.uniform(0.5, 1.5, shape).astype(np.float32)
