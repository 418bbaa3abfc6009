"""Small models that are cut over a further axis of the mesh, one for each way to say so."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.parallel import constrain, shard_map
from tests.models import cross_entropy

VOCABULARY, WIDTH, HEADS, LENGTH, EXPERTS = 12, 8, 4, 6, 4


def make_batch(num_micro_batches=3, rows=4, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (num_micro_batches, rows, LENGTH + 1)).astype(np.int32)
    return tokens[..., :-1], tokens[..., 1:]


def attention(q, k, v, first=0):
    """Causal; leaves [B, L, heads, D]. The first query stands at position `first` of the keys."""
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(q.shape[-1])
    seen = first + jnp.arange(q.shape[1])[None, None, :, None] >= jnp.arange(k.shape[1])[None, None, None]
    return jnp.einsum("bhlm,bmhd->blhd", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)


# ------------------------------------------------------------------- a GPT: attention heads and MLP cut over "model"


def linear(inside, outside, names, rngs, use_bias=True):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    return nnx.Linear(inside, outside, use_bias=use_bias, kernel_init=init, rngs=rngs)


class GPTBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        # Without a bias: that of the keys has no gradient but rounding, of which adam makes steps.
        self.qkv = linear(WIDTH, 3 * WIDTH, ("embed", "heads"), rngs, use_bias=False)
        self.out = linear(WIDTH, WIDTH, ("heads", "embed"), rngs)
        self.up = linear(WIDTH, 4 * WIDTH, ("embed", "mlp"), rngs)
        self.down = linear(4 * WIDTH, WIDTH, ("mlp", "embed"), rngs)

    def __call__(self, x):
        heads = self.qkv(self.norm(x)).reshape(*x.shape[:2], HEADS, 3 * WIDTH // HEADS)
        x = x + self.out(attention(*jnp.split(heads, 3, -1)).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(x)))


class Embedding(nnx.Module):
    def __init__(self, *, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, WIDTH)))

    def __call__(self, tokens):
        return self.table[tokens]


class Head(nnx.Module):
    def __init__(self, *, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, VOCABULARY)) / 3)

    def __call__(self, x):
        return x @ self.kernel[...]


# Biases and the first and last layer have no annotation; a rule by path is a second door to the same.
GPT_RULES = {
    "sharding": [
        (r"up/bias", P("model")),
        ("table", P("model")),
        (r"layer_\d+/kernel$", P(None, "model")),
    ],
    "axis_rules": {"embed": None, "heads": "model", "mlp": "model"},
}


def gpt(blocks=3, **options):
    spec = jaxpipe.LayerSpec
    layers = [spec(Embedding), *[spec(GPTBlock) for _ in range(blocks)], spec(Head)]
    return jaxpipe.PipelineModule(layers, cross_entropy, **{**GPT_RULES, **options})


# -------------------------------------------------------------------------- a mixture of experts, cut over "expert"


class Experts(linen.Module):
    """Each token goes to its best expert. The names of dims are mesh axes themselves."""

    @linen.compact
    def __call__(self, x):
        cut = linen.with_partitioning(linen.initializers.lecun_normal(), ("expert", None, None))
        up = self.param("up", cut, (EXPERTS, WIDTH, 2 * WIDTH))
        down = self.param("down", cut, (EXPERTS, 2 * WIDTH, WIDTH))
        weights = jax.nn.softmax(linen.Dense(EXPERTS, name="router")(x))
        chosen = weights * jax.nn.one_hot(weights.argmax(-1), EXPERTS)
        hidden = jax.nn.relu(jnp.einsum("bld,edf->belf", x, up))
        return x + jnp.einsum("belf,efd,ble->bld", constrain(hidden, P("data", "expert")), down, chosen)


class LinenEmbed(linen.Module):
    """Logical names, which `axis_rules` maps, and a logical constraint on an activation."""

    @linen.compact
    def __call__(self, tokens):
        init = linen.with_logical_partitioning(linen.initializers.normal(1.0), ("vocabulary", "embed"))
        table = self.param("table", init, (VOCABULARY, WIDTH))
        return linen.with_logical_constraint(table[tokens], ("rows", "length", "embed"))


class LinenHead(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(VOCABULARY)(x)


def experts(blocks=3):
    spec = jaxpipe.LayerSpec
    return jaxpipe.PipelineModule(
        [spec(LinenEmbed), *[spec(Experts) for _ in range(blocks)], spec(LinenHead)],
        cross_entropy,
        axis_rules={"vocabulary": None, "embed": "expert", "rows": "data", "length": None},
    )


# ------------------------------------------------------------------------- attention with the sequence cut over "sequence"


def init_attention(key, x):
    one, two = jax.random.split(key)
    return {
        "qkv": jax.random.normal(one, (WIDTH, 3 * WIDTH)) / 4,
        "out": jax.random.normal(two, (WIDTH, WIDTH)) / 6,
    }


def gathered_attention(params, x):
    """Each device has its own positions of the queries, and gathers the keys and values of all."""

    def part(params, x):
        q, k, v = jnp.split((x @ params["qkv"]).reshape(*x.shape[:2], HEADS, -1), 3, -1)
        k, v = (jax.lax.all_gather(a, "sequence", axis=1, tiled=True) for a in (k, v))
        y = attention(q, k, v, jax.lax.axis_index("sequence") * x.shape[1])
        return x + y.reshape(x.shape) @ params["out"]

    cut = P(None, "sequence")
    return shard_map(part, in_specs=(P(), cut), out_specs=cut, axis_names="sequence")(params, x)


def swapped_attention(params, x):
    """From positions to heads and back by all_to_all; params are cut too, and gathered where they are used."""

    def swap(a, taken, given):
        return jax.lax.all_to_all(a, "sequence", split_axis=given, concat_axis=taken, tiled=True)

    def part(qkv, out, x):
        qkv, out = (jax.lax.all_gather(a, "sequence", axis=0, tiled=True) for a in (qkv, out))
        heads = (x @ qkv).reshape(*x.shape[:2], HEADS, -1)
        y = attention(*jnp.split(swap(heads, 1, 2), 3, -1))
        return x + swap(y, 2, 1).reshape(x.shape) @ out

    cut, rows = P(None, "sequence"), P("sequence")
    run = shard_map(part, in_specs=(rows, rows, cut), out_specs=cut, axis_names="sequence", check_vma=False)
    return run(params["qkv"], params["out"], x)


def sequences():
    layer = jaxpipe.Layer
    embed = layer(lambda key, x: {"table": jax.random.normal(key, (VOCABULARY, WIDTH)) / 2}, lambda p, x: p["table"][x])
    head = layer(
        lambda key, x: {"kernel": jax.random.normal(key, (WIDTH, VOCABULARY)) / 3},
        lambda p, x: constrain(x, P(None, "sequence")) @ p["kernel"],
    )
    gathered, swapped = layer(init_attention, gathered_attention), layer(init_attention, swapped_attention)
    return jaxpipe.PipelineModule(
        [embed, gathered, gathered, swapped, swapped, head],
        cross_entropy,
        sharding=[(r"layer_00[34]/(qkv|out)", P("sequence"))],
    )
