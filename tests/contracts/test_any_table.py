"""Any valid table runs: random ones, and those that torch writes. Loss and gradients are those of one device.

Continuous integration runs a few; with JAXPIPE_ALL_TABLES in the environment there are 300, and all sizes of torch's.
"""

import functools
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.schedules import Schedule
from tests.compare import assert_close
from tests.contracts.test_torch_csv import dumps
from tests.schedules.tables import random_schedule

WIDTH, ROWS, LAYERS = 3, 2, 13
SPLIT = False  # whether tables that split the backward run


def _init(key, x):
    return {"w": jax.random.normal(key, (WIDTH, WIDTH)) / 2}


def _noisy(p, x, *, key):
    y = x + jnp.tanh(x @ p["w"])
    return y if key is None else y * jax.random.uniform(key, y.shape, minval=0.5, maxval=1.5)


def _start():
    return jaxpipe.Layer(_init, lambda p, ids: p["w"][ids], "Start")


BLOCK = jaxpipe.Layer(_init, _noisy, "Block")
ODD = jaxpipe.Layer(_init, lambda p, x: jnp.sin(x @ p["w"]) + x, "Odd")
ENTRIES = [
    jaxpipe.TiedLayerSpec("tie", _start),
    *[BLOCK] * 4,
    jnp.tanh,
    ODD,
    *[BLOCK] * 4,
    ODD,
    jaxpipe.TiedLayerSpec("tie", _start, forward_fn=lambda p, x: x @ p["w"].T),
]


def loss_fn(y, t):
    return ((y - t) ** 2).mean()


@functools.cache
def _wanted(num_micro_batches):
    """A batch, a key, and what one device makes of them from the weights of key 1. These depend on no table."""
    rng = np.random.default_rng(num_micro_batches)
    shape = num_micro_batches, ROWS
    batch = rng.integers(0, WIDTH, shape), rng.normal(size=(*shape, WIDTH)).astype(np.float32)
    module, key = jaxpipe.PipelineModule(ENTRIES, loss_fn), jax.random.key(2)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh())
    layers = jax.device_get(pipe.to_layers(pipe.init(1, batch[0][0])))
    return batch, key, layers, jaxpipe.reference.value_and_grad(module, layers, batch, key)


def check(table, seed):
    """Runs a table on a partition and with a remat mode that follow from the seed, poisoned."""
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.sample(range(1, LAYERS), table.num_stages - 1)), LAYERS]
    remat = rng.choice(["layer", "layer", "none", "stage", 2])
    batch, key, layers, (loss, grads) = _wanted(table.num_micro_batches)
    module = jaxpipe.PipelineModule(ENTRIES, loss_fn, partition_method=cuts)
    mesh = jaxpipe.make_mesh(pipe=table.num_ranks)
    pipe = jaxpipe.Pipeline(module, mesh, table.num_micro_batches, table, remat, poison=True)
    found, gradients = pipe.value_and_grad(pipe.from_layers(layers), batch, key)
    assert_close(found, loss, 1e-6, "loss")
    assert_close(jax.device_get(pipe.to_layers(gradients)), grads, 1e-6, "layers")


ALL = "JAXPIPE_ALL_TABLES" in os.environ


@pytest.mark.parametrize("seed", range(300) if ALL else (0, 12, 24, 36))
def test_random_tables(seed):
    """Up to three chunks on each of up to four ranks, anywhere, and any order of their ops."""
    check(random_schedule(seed, backward=None if SPLIT else "whole"), seed)


TORCH = ["ScheduleInterleaved1F1B", "ScheduleLoopedBFS"]
TORCH += ["ScheduleZBVZeroBubble", "ScheduleInterleavedZeroBubble", "ScheduleDualPipeV"] if SPLIT else []
SIZES = [(2, 4), (2, 8), (4, 4), (4, 8)] if ALL else [(2, 4)]


@pytest.mark.torch
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
@pytest.mark.parametrize("name", TORCH)
def test_tables_of_torch(name, ranks, micro_batches, tmp_path):
    if name == "ScheduleDualPipeV" and micro_batches < 2 * ranks:
        pytest.skip("torch makes none of so few micro-batches")
    check(Schedule.from_csv(dumps(name, ranks, micro_batches, tmp_path)[0]), ranks + micro_batches)
