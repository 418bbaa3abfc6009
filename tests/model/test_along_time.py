"""Layers that treat every position by itself, and layers that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.model.along_time import mixes

LENGTH, WIDTH = 9, 8
X = jnp.zeros((1, LENGTH, WIDTH))


def found(function, x=X, knows=False, time=1):
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(x)
    return mixes(jaxpr, [1] * len(jax.tree.leaves(x)), [time] * len(jax.tree.leaves(shape)), knows)


LOCAL = {
    "linear": lambda x: nnx.Linear(WIDTH, 5, rngs=nnx.Rngs(0))(x),
    "norm": lambda x: nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0))(x),
    "gelu": jax.nn.gelu,
    "softmax": jax.nn.softmax,
    "gate": lambda x: jax.nn.silu(x[..., :4]) * x[..., 4:],
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, -1), -1),
    "heads": lambda x: x.reshape(1, LENGTH, 2, 4).transpose(0, 2, 1, 3).swapaxes(1, 2).reshape(x.shape),
    "flat": lambda x: (x.reshape(-1, WIDTH) @ jnp.ones((WIDTH, 4))).reshape(1, LENGTH, 4),
    "argmax": lambda x: jax.nn.one_hot(jnp.argmax(x, -1), 5),
    "top_k": lambda x: jax.lax.top_k(x, 2)[0],
    "own entry": lambda x: jnp.take_along_axis(x, jnp.argmax(x, -1)[..., None], -1),
    "table": lambda x: jnp.ones((11, 3))[x[..., 0].astype(jnp.int32)],
    "experts": lambda x: jnp.einsum(
        "bte,edf,btd->btf", jax.nn.softmax(x @ jnp.ones((WIDTH, 3))), jnp.ones((3, 8, 8)), x
    ),
    "layers in a scan": lambda x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, jnp.ones((3, 8, 8)))[0],
    "outputs of a scan": lambda x: jax.lax.scan(lambda c, w: (c @ w, c), x, jnp.ones((3, 8, 8)))[1].sum(0),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.tanh(x) @ jnp.ones((8, 8)))(x),
    "constant": lambda x: jnp.broadcast_to(jnp.arange(4.0), (1, LENGTH, 4)),
    "pad and reverse": lambda x: jnp.pad(x[..., ::-1], ((0, 0), (0, 0), (1, 1))),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local(name):
    assert found(LOCAL[name]) is None
    one = jax.random.normal(jax.random.key(0), X.shape)
    # And the analysis is right: a position alone gives what it gives among others.
    if name not in ("heads", "flat", "constant"):  # which have the length written down
        np.testing.assert_allclose(LOCAL[name](one)[:, 4:5], LOCAL[name](one[:, 4:5]), rtol=1e-5)


MIXED = {
    "attention": lambda x: nnx.MultiHeadAttention(2, WIDTH, rngs=nnx.Rngs(0), decode=False)(x),
    "mean": lambda x: x - x.mean(1, keepdims=True),
    "shift": lambda x: jnp.roll(x, 1, 1),
    "window": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],
    "convolution": lambda x: jax.lax.conv_general_dilated(
        x, jnp.ones((3, 8, 8)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "sum so far": lambda x: jnp.cumsum(x, 1),
    "recurrence": lambda x: jax.lax.scan(lambda c, a: (c + a, c), jnp.zeros((1, 8)), x.swapaxes(0, 1))[1].swapaxes(
        0, 1
    ),
    "last": lambda x: x[:, -1:] + 0 * x,
    "reversed": lambda x: x[:, ::-1],
    "norm of all": lambda x: x / jnp.linalg.norm(x),
    "sorted": lambda x: jnp.sort(x, 1),
    "positions as width": lambda x: jnp.einsum("btd,tu->bud", x, jnp.ones((LENGTH, LENGTH))),
    "one for all": lambda x: jnp.broadcast_to(x[:, :1], x.shape),
    "carried": lambda x: jax.lax.scan(lambda c, w: (c + jnp.roll(c, 1, 1), None), x, jnp.ones(3))[0],
    "moved": lambda x: x.swapaxes(1, 2),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("knows", [False, True])
def test_mixed(name, knows):
    assert found(MIXED[name], knows=knows) is not None


PLACED = {
    "table of places": lambda x: x + jnp.asarray(np.eye(LENGTH, WIDTH, dtype=np.float32))[None],
    "waves": lambda x: x + jnp.sin(jnp.arange(LENGTH, dtype=jnp.float32))[None, :, None],
    "weights of places": lambda x: jnp.einsum("btd,tdf->btf", x, jnp.arange(216.0).reshape(LENGTH, WIDTH, 3)),
}


@pytest.mark.parametrize("name", PLACED)
def test_where_a_position_stands_matters_only_to_layers_that_are_not_told(name):
    assert found(PLACED[name]) is not None and found(PLACED[name], knows=True) is None


def test_ids():
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    embed = nnx.Embed(11, WIDTH, rngs=nnx.Rngs(0))
    assert found(embed, ids) is None and found(embed.attend) is None
    assert found(lambda ids: jnp.take(jnp.ones((11, 8)), ids, axis=0), ids) is None
