"""What an optimizer moves between devices, read off compiled programs."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpipe
from tests.optimizer.optimizers import OPTIMIZERS, by_ndim

COLLECTIVE = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("


def moved(text):
    """Entries that come out of the collectives of a compiled program, one number for each of them."""
    found = []
    for match in re.finditer(COLLECTIVE, text):
        shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
        found.append(sum(math.prod(int(d) for d in shape.split(",") if d) for shape in shapes))
    return found


def compiled_update(tx, blocks, stages=4, ends=False):
    """The update of a model of like blocks, compiled from shapes; `ends`: with two layers that occur once."""

    def init(key, x):
        return {"a": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}, "b": {"kernel": jnp.ones((32, 16))}}

    block = jaxpipe.Layer(init, lambda p, x: x, "Block")
    layers = [block] * blocks
    if ends:
        layers = [jaxpipe.Layer(lambda k, x: {"e": jnp.ones((64, 16))}, lambda p, x: x, "Embed"), *layers]
    pipe = jaxpipe.Pipeline(jaxpipe.PipelineModule(layers, partition_method="uniform"), jaxpipe.make_mesh(pipe=stages))
    params = pipe.init(jax.random.key(0), jnp.ones((2, 16)))
    tx = pipe.optimizer(tx)
    state = tx.init(params)
    return jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.float32(1))).lower(params, state, params).compile()


SEPARATE = [
    "sgd",
    "adam",
    "adamw_ndim",
    "adamw_path",
    "lion",
    "lamb",
    "lars",
    "novograd",
    "adaptive_grad_clip",
    "by_path",
]


@pytest.mark.parametrize("name", [*SEPARATE, "adafactor", "muon", "noisy_sgd", "plateau", "rate_per_layer"])
def test_what_treats_layers_separately_moves_nothing(name):
    assert moved(compiled_update(OPTIMIZERS[name], 7).as_text()) == []


@pytest.mark.parametrize("name", ["clip_adamw", "apply_if_finite", "lamb"])
def test_scalars_that_join_layers_travel_together(name):
    """One number per leaf and layer, in one gather; of the layer that occurs once, numbers only."""
    found = moved(compiled_update(OPTIMIZERS[name], 7, ends=True).as_text())
    assert max(found, default=0) <= 4 * 2 * 3 * 2 and len(found) <= 6, found
    assert max(found, default=0) < 16 * 32


def test_arrays_that_meet_are_gathered_once():
    found = moved(compiled_update(optax.flatten(optax.adam(1e-2)), 7).as_text())
    weights = 4 * 2 * (2 * 16 * 32 + 32)  # with padding
    assert weights <= sum(found) <= 2 * weights


def test_the_program_does_not_grow_with_the_layers():
    """64 like layers, a mask by ndim: the instructions of 8."""
    tx = optax.adamw(1e-2, weight_decay=0.1, mask=by_ndim)
    few, many = (len(compiled_update(tx, blocks).as_text().splitlines()) for blocks in (8, 64))
    assert many <= 1.05 * few, (few, many)
