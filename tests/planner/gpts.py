"""A GPT of any size on shapes, for the tests of the planner: embedding, blocks, head, cross entropy in float32."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.hardware.chips import as_chip
from jaxpipe.model.precision import Precision
from jaxpipe.planner.cost import Costs
from jaxpipe.planner.step import Steps
from jaxpipe.planner.trace import Model

CUT = [
    ("qkv", P(None, None, "model")),
    ("out", P("model", None)),
    ("up", P(None, "model")),
    ("down", P("model", None)),
    ("kernel", P(None, "model")),
]


def _norm(x, scale):
    wide = x.astype(jnp.float32)
    found = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    return found.astype(x.dtype) * jnp.broadcast_to(scale, x.shape)


def gpt(blocks=2, width=8, heads=2, length=4, vocabulary=16, rows=1, **options):
    """A module, and the shapes of an example of some rows."""

    def matrix(key, *shape):
        return 0.02 * jax.random.normal(key, shape)

    def init_block(key, x):
        keys = jax.random.split(key, 4)
        return {
            "qkv": matrix(keys[0], 3, width, width),
            "out": matrix(keys[1], width, width),
            "up": matrix(keys[2], width, 4 * width),
            "down": matrix(keys[3], 4 * width, width),
            "scale_1": jnp.ones(width),
            "scale_2": jnp.ones(width),
        }

    def block(p, x):
        y = _norm(x, p["scale_1"])
        q, k, v = (jnp.reshape(y @ p["qkv"][i], (*x.shape[:2], heads, width // heads)) for i in range(3))
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k).astype(jnp.float32) * (width // heads) ** -0.5
        seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        mixed = jax.nn.softmax(jnp.where(jnp.broadcast_to(seen, scores.shape), scores, -1e30)).astype(x.dtype)
        x = x + jnp.einsum("bhlm,bmhd->blhd", mixed, v).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(_norm(x, p["scale_2"]) @ p["up"]) @ p["down"]

    def loss(logits, labels):
        logits = logits.astype(jnp.float32)
        right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - right).mean()

    embedding = jaxpipe.Layer(
        lambda key, x: {"table": matrix(key, vocabulary, width)}, lambda p, x: p["table"][x], "embedding"
    )
    head = jaxpipe.Layer(
        lambda key, x: {"kernel": matrix(key, width, vocabulary)}, lambda p, x: x @ p["kernel"], "head"
    )
    module = jaxpipe.PipelineModule(
        [embedding, *[jaxpipe.Layer(init_block, block, "block")] * blocks, head], loss, **options
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return module, (ids, ids)


def model(dtype="bfloat16", **sizes):
    """The traces of such a GPT."""
    module, example = gpt(**sizes)
    mesh = jaxpipe.make_mesh(1, 1, devices=jax.devices()[:1], model=1)
    return Model(module, example, mesh, Precision.of(dtype, None))


def steps(chip="a100", **sizes):
    """What predicts steps of such a GPT on a chip."""
    return Steps(Costs(model(**sizes), as_chip(chip)))
