"""Every optimizer of the registry gives on the stacks what it gives on one entry per layer, at several cuts.

Some of the cuts have two data ranks over which weights and state are cut, too. `w`, `b` and `scale` are padded for that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from tests.optimizer.optimizers import ALIKE, LOOSE, OPTIMIZERS, error, natural, plain

STEPS = 5


def block(key, x):
    normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    return {"w": normal(0, 7, 5), "b": normal(1, 7), "conv": normal(2, 3, 3, 4, 6), "norm": {"scale": normal(3, 7)}}


BLOCK = jaxpipe.Layer(block, lambda p, x: x, "Block")
EMBED = jaxpipe.Layer(lambda key, x: {"e": jax.random.normal(key, (13, 7))}, lambda p, x: x, "Embed")
HEAD = jaxpipe.Layer(
    lambda key, x: {"w": jax.random.normal(key, (7, 12)), "b": jnp.ones(12)},
    lambda p, x: x,
    "Head",
)
# Uneven stages, and for 4 a rank without a block: rank 1.
CUTS = {1: [0, 7], 2: [0, 4, 7], 3: [0, 2, 3, 7], 4: [0, 2, 3, 6, 8]}


def layers_of(stages):
    return [EMBED, *[BLOCK] * 5, HEAD] if stages < 4 else [EMBED, BLOCK, jnp.tanh, BLOCK, BLOCK, BLOCK, BLOCK, HEAD]


@functools.cache
def shapes_of(stages):
    module = jaxpipe.PipelineModule(layers_of(stages), lambda y, t: y.mean())
    return [s.params for s in module.shapes(jnp.zeros((2, 6)))]


def random_layers(seed, stages):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape), a.dtype), shapes_of(stages))


# Each optimizer at a cut with much padding and at one with little or none; those with a neighbour at one cut.
CASES = {name: (3 + i % 2,) if name in ALIKE else (3 + i % 2, 1 + i // 2 % 2) for i, name in enumerate(OPTIMIZERS)}
# Stages at which weights are cut over two data ranks; with 3, there would not be enough devices for all.
CUT_OVER_DATA = (1, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_through_the_pipeline(name):
    past = {}
    for stages in CASES[name]:
        module = jaxpipe.PipelineModule(layers_of(stages), lambda y, t: y.mean(), CUTS[stages])
        zero = int(stages in CUT_OVER_DATA)
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages, data=1 + zero), zero_stage=zero)
        params = pipe.from_layers(random_layers(0, stages))
        tx = pipe.optimizer(OPTIMIZERS[name])
        if (stages < 4) not in past:
            past[stages < 4] = plain_steps(name, natural(pipe.to_layers(params)), stages)
        state = tx.init(params)

        @jax.jit
        def step(grads, state, params, extra, tx=tx):
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        for k in range(STEPS):
            grads = pipe.from_layers(random_layers(k + 1, stages))
            extra = {"value": jnp.float32(1 + 0.1 * k)} | ({"grad": grads} if name == "value_and_grad" else {})
            params, state = step(grads, state, params, extra)
            assert jax.tree.structure(params) == jax.tree.structure(grads)
            wanted_params, wanted_state = past[stages < 4][k]
            found_params, found_state = jax.device_get((params, state))
            found = natural(pipe.to_layers(found_params)), tx.natural_state(found_state)
            off = max(error(found[0], wanted_params), error(found[1], wanted_state))
            assert off <= LOOSE.get(name, 1e-6), f"S = {stages}, step {k}: {off:.1e}"
        padding_is_zero(pipe, (params, state.stacked))
        again = pipe.from_layers(pipe.to_layers(params))
        assert all((np.asarray(a) == b).all() for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True))


def plain_steps(name, layers, stages):
    """Params and state after each step of optax on one entry per layer, on one device."""
    init, update = plain(name)
    params = jax.device_put(jax.device_get(layers), jax.devices()[0])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, steps = jax.jit(init)(params), []

        @jax.jit
        def step(grads, state, params, value):
            updates, state = update(grads, state, params, value)
            return optax.apply_updates(params, updates), state

        for k in range(STEPS):
            grads = natural(random_layers(k + 1, stages))
            params, state = step(grads, state, params, jnp.float32(1 + 0.1 * k))
            steps.append(jax.device_get((params, state)))
    return steps


def padding_is_zero(pipe, trees):
    params, stacked = trees
    for name, stack in pipe.layout.stacks.items():
        used = set(stack.places.values())
        empty = [(r, k) for r in range(pipe.num_stages) for k in range(stack.slots) if (r, k) not in used]
        for leaf in jax.tree.leaves((params["stacked"][name], stacked[name])):
            for at in empty:
                assert not np.any(np.asarray(leaf)[at])
