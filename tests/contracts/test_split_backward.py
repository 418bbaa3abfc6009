"""Schedules that take the backward apart compute what one device does, whatever the layers are.

All run poisoned: what nothing was written to, and what has been read for the last time, holds NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import schedules
from tests import stateful_models
from tests.compare import assert_close
from tests.contracts import test_extra_losses as extra
from tests.contracts import test_frozen as frozen
from tests.contracts import test_unlike as unlike
from tests.lowering.programs import in_random_order, loop_of, v_of
from tests.models import MODELS, make_batch

# table, data, remat, dropout, model, boundaries
GRADIENTS = {
    "one rank": (schedules.zero_bubble(1, 3), 1, "none", True, "tied", [0, 9]),
    "fewer micro-batches than stages": (schedules.zero_bubble(4, 2), 1, "layer", True, "mixed", [0, 1, 5, 6, 9]),
    "two data ranks": (schedules.zero_bubble(3, 5), 2, "dots", True, "tied", [0, 4, 5, 9]),
    "whole stages": (schedules.zero_bubble(2, 4), 1, "stage", False, "untied", [0, 5, 9]),
    "some whole, some in two": (in_random_order(loop_of(3, 1), 4, 3, split=0.5), 1, 2, True, "tied", [0, 4, 6, 9]),
    "chunks": (schedules.interleaved_zero_bubble(4, 4, num_chunks=2), 1, "none", True, "tied", [0, 2, 5, 7, 9]),
    "a V": (schedules.zbv(4, 3), 2, "layer", True, "untied", [0, 2, 5, 7, 9]),
    "anywhere": (in_random_order((2, 0, 1, 1, 0), 3, 2, split=0.6), 1, "dots", False, "mixed", [0, 2, 3, 5, 7, 9]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    table, data, remat, dropout, model, partition = GRADIENTS[name]
    assert table.split_backward
    module, batch = MODELS[model](partition), make_batch(table.num_micro_batches)
    check(module, table, data, remat, batch, jax.random.key(2) if dropout else None, 1e-6)


def test_gradients_in_64_bits():
    with jax.enable_x64(True):
        module, batch = MODELS["tied"]([0, 1, 5, 9]), make_batch(4)
        check(module, schedules.zero_bubble(3, 4), 1, "layer", batch, jax.random.key(2), 1e-12)


def check(module, table, data, remat, batch, key, tolerance, **settings):
    mesh = jaxpipe.make_mesh(pipe=table.num_ranks, data=data)
    pipe = jaxpipe.Pipeline(module, mesh, table.num_micro_batches, table, remat, poison=True, **settings)
    params = pipe.init(jax.random.key(1), batch[0][0])
    loss, grads = pipe.value_and_grad(params, batch, key)
    layers = pipe.to_layers(params)
    wanted = jaxpipe.reference.value_and_grad(module, layers, batch, key, num_data_ranks=data)
    assert_close(loss, wanted[0], tolerance, "loss")
    assert_close(pipe.to_layers(grads), wanted[1], tolerance, "layers")


IN_THE_TAIL = jaxpipe.PipelineModule(
    [
        *[jaxpipe.LayerSpec(stateful_models.Normed, stateful_models.WIDTH)] * 3,
        stateful_models.EMA,
    ],
    stateful_models.loss,
    partition_method=[0, 1, 2, 4],
)


@pytest.mark.parametrize(
    ("remat", "model"), [("layer", stateful_models.module(stateful_models.UNEVEN[3])), ("none", IN_THE_TAIL)]
)
def test_state_of_layers(remat, model):
    """Layers whose derivative reads their state, in the tail as well: what W needs of it is that of its own micro-batch."""
    pipe = jaxpipe.Pipeline(
        model, jaxpipe.make_mesh(pipe=3, data=2), 4, schedules.zero_bubble(3, 4), remat, poison=True
    )
    stateful_models.check_with_oracle(pipe, stateful_models.make_batch(4), 2)


def test_extra_losses():
    """With layers whose backward is not linear."""
    table = in_random_order(v_of(2), extra.M, 1, split=0.7)
    module = jaxpipe.PipelineModule(extra.LAYERS, extra.weighted_loss, [0, 1, 3, 5, 8])
    check(module, table, 1, "layer", extra.batch_of(), None, 1e-6)


@pytest.mark.parametrize("rule", [r"layer_00[5-8]", r"layer_000|up"])
def test_frozen_layers(rule):
    """The first rule leaves ranks without any backward, the second one layers with half of one."""
    module, batch = MODELS["untied"]([0, 1, 5, 9]), make_batch(4)
    table = schedules.zero_bubble(3, 4)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=3), 4, table, "dots", trainable=rule, poison=True)
    params = pipe.init(1, batch[0][0])
    loss, grads = pipe.value_and_grad(params, batch, 2)
    wanted = jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), batch, 2)
    assert_close(loss, wanted[0], 1e-6)
    found = {path: grad for path, grad in frozen.by_path(pipe.to_layers(grads)).items() if grad.dtype != jnp.int32}
    assert_close(found, frozen.trained(wanted[1], rule), 1e-6)


def test_unlike_layers():
    """Each rank holds its own, in vectors and rooms, and piles."""
    module = unlike.module(unlike.CUTS[4])
    check(module, schedules.zero_bubble(4, unlike.M), 2, "none", unlike.batch(), None, 1e-6, zero_stage=1)


def scanned(p, x):
    """A layer that is a scan over blocks, of which each is run again in the backward."""

    @jax.checkpoint
    def block(x, w):
        return x + jnp.tanh(x @ w), x.mean()

    x, means = jax.lax.scan(block, x, p["w"])
    return x * (1 + means.sum())


def chosen(p, x):
    """Which branch runs depends on the input."""
    return jax.lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ p["w"][0]), lambda: x @ p["w"][1]) + x


@jax.custom_vjp
def rounded(w, x):
    return x @ w


rounded.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ jnp.round(64 * g) / 64, jnp.tanh(g) @ kept[0].T)
)


def test_scans_branches_and_backwards_of_users():
    def init(key, x):
        return {"w": jax.random.normal(key, (2, 4, 4), x.dtype) / 2}

    functions = (scanned, chosen, lambda p, x: rounded(p["w"][1], x), scanned)
    layers = [jaxpipe.Layer(init, function, f"L{i}") for i, function in enumerate(functions)]
    module = jaxpipe.PipelineModule([*layers, jaxpipe.Layer(init, lambda p, x: x @ p["w"][0], "Head")], squares)
    rng = np.random.default_rng(0)
    batch = tuple(rng.normal(size=(2, 3, 5, 4)).astype(np.float32))
    with jax.enable_x64(True):  # rounding goes either way in 32 bits
        batch = tuple(a.astype(np.float64) for a in batch)
        check(module, schedules.zero_bubble(2, 3), 1, "layer", batch, None, 1e-12)


def squares(y, t):
    return ((y - t) ** 2).mean()
