"""A whole model as one stage: forward, tail and backward against `jax.value_and_grad` of plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import schedules
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.executor.pullback import Twice
from jaxpipe.executor.seeds import Seeds
from jaxpipe.executor.stage_program import MicroBatch
from jaxpipe.layout.layout import Layout
from jaxpipe.model import keys
from jaxpipe.model.context import Aux
from tests.compare import assert_close
from tests.executor.small import BLOCK, LAYERS, MODULE, WIDTH, make_batch, prepared

KEY = jax.random.key(4, impl="rbg")  # it compiles faster than the usual one
LAYOUT, MESH, PROGRAM, PARAMS = prepared((0, 6), schedules.one_f_one_b(1, 2))
BATCH = make_batch(2)


def plain(layers, ids, labels, key):
    x = ids
    for index, (layer, params) in enumerate(zip(LAYERS, layers, strict=True)):
        more = {"key": keys.layer_key(key, index)} if layer is BLOCK else {}
        x = layer.apply(params, x, **more)
    return ((x - labels) ** 2).mean()


@pytest.fixture(scope="module")
def wanted():
    """Loss and gradients of micro-batch 1."""
    layers = jax.device_get(LAYOUT.to_layers(PARAMS))
    return jax.jit(jax.value_and_grad(plain, allow_int=True))(layers, BATCH[0][1], BATCH[1][1], KEY)


def program_of(remat):
    plan = TrainPlan(LAYOUT, MESH, PROGRAM, remat, BATCH, KEY)
    (program,) = plan.programs
    plan.store.settle([3])
    return plan, program


@pytest.mark.parametrize("remat", ["layer", "none", "stage", 2])
def test_forward_and_backward(remat, wanted):
    plan, program = program_of(remat)

    @jax.jit
    def run(params, ids, labels, key):
        held = plan.weights.enter(params, jnp.int32(0))
        buffers = plan.store.allocate(poison=True)
        micro_batch = MicroBatch(key, ids, labels, jnp.int32(1), jnp.int32(0), jnp.int32(0), jnp.int32(0))
        y, buffers, beside = program.forward(held, ids, micro_batch, buffers, Aux())
        grads = plan.weights.blank_gradients(held)
        both = Twice.of(held)
        seed = Seeds(jnp.float32(0.5))
        total, dy, grads, beside = program.loss_and_gradient(held, micro_batch, buffers, beside, grads, seed)
        dx, grads = program.backward(both, dy, micro_batch, buffers, beside, grads)
        return y, buffers, total, dx, plan.weights.leave(grads, jnp.int32(0))

    ids, labels = BATCH[0][1], BATCH[1][1]
    y, buffers, total, dx, grads = run(PARAMS, ids, labels, KEY)
    assert y["h"].shape == (4, 3) and dx == [], "the forward stops before the tail; integers have no gradient"
    found = LAYOUT.to_layers(grads)
    assert_close(total, wanted[0], 1e-6)
    for index, (a, b) in enumerate(zip(found, wanted[1], strict=True)):
        assert_close(a["w"], 0.5 * b["w"], 2e-6, f"layer {index}")
        assert a["n"] == 0
    for name, buffer in buffers.items():
        if jnp.issubdtype(buffer.dtype, jnp.inexact):
            own = buffer.reshape(3, -1)
            assert np.isnan(np.delete(own, 1, 0)).all() and not np.isnan(own[1]).any(), (
                f"{name}: its own slot, and no other"
            )


def test_what_is_in_the_batch_is_not_kept():
    """The first unit's input is known where the unit does not repeat; then everything has one entry per repetition."""
    _, program = program_of("layer")
    start, blocks = program.segments
    assert (start.in_batch, start.repeats, start.kept, start.entries) == (True, 1, [], ())
    assert (blocks.in_batch, blocks.repeats) == (False, 4)
    assert [leaf.shape for leaf in blocks.kept] == [(4, 3), (4,)]
    _, program = program_of("stage")
    (whole,) = program.segments
    assert whole.in_batch and whole.entries == () and len(whole.unit.parts) == 2
    assert program.tail is not None and [part.label for part in program.tail.parts] == ["layer 5 (Head)"]


def test_entries_are_as_many_as_are_made():
    plan, program = program_of(3)
    assert [(segment.repeats, segment.unit.parts[0].count) for segment in program.segments] == [(1, 1), (1, 3), (1, 1)]
    sizes = {name: aval.shape for name, aval in plan.store.avals().items()}
    wanted = {"float32[4,3]": (9, 4, 3), "int32[4]": (9, 4)}
    assert sizes == wanted, "two units of blocks, and the tail's input"


def test_a_run_of_layers_at_the_very_beginning_keeps_what_it_takes():
    """Only the first of them takes what is in the batch."""
    module = jaxpipe.PipelineModule(LAYERS[1:], MODULE.loss_fn)
    ids, labels = BATCH
    inputs = {"h": np.ones((*ids.shape, WIDTH), np.float32), "ids": ids, "none": None}
    shapes = module.shapes(jax.tree.map(lambda a: a[0], inputs))
    layout = Layout(module, (0, 5), [each.params for each in shapes])
    (program,) = TrainPlan(layout, MESH, PROGRAM, "layer", (inputs, labels), None).programs
    (blocks,) = program.segments
    assert (blocks.in_batch, blocks.repeats, len(blocks.entries)) == (False, 4, 2)
    (program,) = TrainPlan(layout, MESH, PROGRAM, 4, (inputs, labels), None).programs
    (blocks,) = program.segments
    assert (blocks.in_batch, blocks.repeats, len(blocks.entries)) == (True, 1, 0)
