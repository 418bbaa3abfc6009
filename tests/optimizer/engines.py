"""Engines of a small model for every optimizer, and the same training on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpipe
from tests.optimizer.optimizers import natural, plain

M, ROWS, WIDTH, STEPS = 3, 4, 6, 5


def dense(key, *shape):
    return jax.random.normal(key, shape) / 3


def block_init(key, x):
    keys = jax.random.split(key, 3)
    return {
        "w": dense(keys[0], WIDTH, WIDTH),
        "b": 0.1 * dense(keys[1], WIDTH),
        "conv": dense(keys[2], 3, 3, WIDTH, WIDTH) / 9,
        "norm": {"scale": jnp.full((WIDTH,), 1.1)},
    }


def block(p, x):
    mixed = jnp.einsum("bi,hwij->bj", x, p["conv"])
    return x + jnp.tanh(x @ p["w"] + p["b"][None] + mixed) * p["norm"]["scale"][None]


LAYERS = [
    jaxpipe.Layer(lambda k, x: {"e": dense(k, 12, WIDTH)}, lambda p, x: p["e"][x], "Embed"),
    *[jaxpipe.Layer(block_init, block, "Block") for _ in range(5)],
    jaxpipe.Layer(
        lambda k, x: {"w": dense(k, WIDTH, 12), "b": dense(k, 12)}, lambda p, x: x @ p["w"] + p["b"][None], "Head"
    ),
]
CUTS = {1: [0, 7], 2: [0, 4, 7], 3: [0, 2, 3, 7], 4: [0, 1, 3, 6, 7]}


def loss_fn(y, t):
    return optax.softmax_cross_entropy_with_integer_labels(y, t).mean()


def batch(step):
    rng = np.random.default_rng(step)
    return rng.integers(0, 12, (M, ROWS)), rng.integers(0, 12, (M, ROWS))


def engine_for(optimizer, stages, **config):
    module = jaxpipe.PipelineModule(LAYERS, loss_fn, CUTS[stages])
    return jaxpipe.initialize(
        module,
        optimizer,
        mesh=jaxpipe.make_mesh(pipe=stages),
        example=tuple(a[0] for a in batch(0)),
        config={"num_micro_batches": M, **config},
        key=jax.random.key(2),
    )


def data(steps, first=0):
    return iter([pair for step in range(first, first + steps) for pair in zip(*batch(step), strict=True)])


@functools.cache
def start():
    return jax.device_get(engine_for(optax.sgd(0.1), 1).to_layers())


@jax.jit
def plain_grads(layers, inputs, labels):
    """Micro-batch after micro-batch, as an accumulating loop does: adam turns the rounding of tiny gradients into steps."""

    def share(layers, x, labels):
        for layer, p in zip(LAYERS, layers.values(), strict=True):
            x = layer.apply(p, x)
        return loss_fn(x, labels) / M

    def add(sums, pair):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(share)(layers, *pair)), None

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, layers)
    return jax.lax.scan(add, start, (inputs, labels))[0]


@functools.cache
def plain_training(name):
    """The weights after each step, on one device."""
    init, update = plain(name)
    layers, past = natural(start()), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, run = jax.jit(init)(layers), jax.jit(update)
        for step in range(STEPS):
            value, grads = plain_grads(layers, *batch(step))
            updates, state = run(grads, state, layers, value)
            layers = optax.apply_updates(layers, updates)
            past.append(jax.device_get(layers))
    return past
