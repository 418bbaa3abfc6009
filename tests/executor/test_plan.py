"""Plans, made from shapes alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import schedules
from jaxpipe.errors import DataError
from jaxpipe.executor.plan import TrainPlan, distinct
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.stages import Stage
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.lower import lower
from tests.executor.small import MODULE, make_batch

SHAPES = MODULE.shapes(jax.ShapeDtypeStruct((4,), jnp.int32))
PARAMS = [each.params for each in SHAPES]


def plan_of(cuts, schedule, remat="layer", data=1, params=PARAMS, module=MODULE, rows=4):
    mesh = jaxpipe.make_mesh(pipe=len(cuts) - 1, data=data)
    batch = make_batch(schedule.num_micro_batches, rows=rows)
    return TrainPlan(Layout(module, cuts, params), mesh, lower(schedule), remat, batch, None)


def size(leaf):
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


@pytest.mark.parametrize("remat", ["layer", "none", "stage"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(3, 4), (3, 1), (1, 2)])
def test_bytes_are_those_of_what_is_allocated(remat, stages, micro_batches):
    cuts = (0, 6) if stages == 1 else (0, 1, 4, 6)
    plan = plan_of(cuts, schedules.gpipe(stages, micro_batches), remat)
    found = plan.bytes_per_rank()
    # An integer and a 3 x 3 matrix per layer: the stack has the slots of the fullest rank, and of Start and Head each rank
    # has one at most.
    assert found["weights"] == found["gradients"] == (3 * 3 * 4 + 4) * (6 if stages == 1 else 4)
    buffers = plan.store.allocate(poison=False)
    assert found["saved"] == sum(map(size, buffers.values())) > 0
    message = 4 * 3 * 4  # float32 [4, 3]; the integers of [4] travel forward only
    y, dx = (1 + plan.program.inboxes[value] if stages > 1 else 0 for value in (Y, DX))  # and the one that was sent
    assert found["messages"] == y * (message + 4 * 4) + dx * message
    assert (found["messages"] == 0) == (stages == 1)


def test_messages_are_counted_by_arrival_slot():
    plan = plan_of((0, 1, 4, 6), schedules.gpipe(3, 4))
    plan.program = dataclasses.replace(plan.program, inboxes={Y: 3, DX: 2})
    assert plan.bytes_per_rank()["messages"] == (1 + 3) * (4 * 3 * 4 + 4 * 4) + (1 + 2) * 4 * 3 * 4


def test_gradients_of_short_floats_are_summed_in_long_ones():
    def init(key, x):
        return {"w": jnp.ones((5, 5), jnp.bfloat16)}

    layer = jaxpipe.Layer(init, lambda p, x: x, "Short")
    module = jaxpipe.PipelineModule([layer, layer], lambda y, t: y.astype(jnp.float32).mean())
    params = [{"w": jax.ShapeDtypeStruct((5, 5), jnp.bfloat16)}] * 2
    found = plan_of((0, 1, 2), schedules.gpipe(2, 1), params=params, module=module).bytes_per_rank()
    assert (found["weights"], found["gradients"]) == (50, 100)


def test_distinct_programs_and_what_print_shows():
    plan = plan_of((0, 1, 2, 3, 6), schedules.one_f_one_b(4, 2), data=2, rows=8)
    assert plan.program_ids == [0, 1, 1, 2] and len(plan.programs) == 3
    text = str(plan)
    assert "4 stages, 3 distinct programs" in text
    assert "program 1 (stages 1 2): 1 x layer 1 (Block)\n" in text
    assert "program 2 (stages 3): 2 x layer 3 (Block), tail of 1 layers and the loss" in text
    assert "y travels as [float32[4,3], int32[4]]" in text and "dx travels as [float32[4,3]]" in text
    assert all(f"{name}: {count:,} bytes" in text for name, count in plan.bytes_per_rank().items())


def test_one_thing_per_distinct_stage():
    stages = [Stage((), first, last, None, None) for first, last in ((True, False), (False, False), (False, False))]
    made = []
    assert distinct(stages, lambda stage: made.append(stage) or len(made)) == ([1, 2], [0, 1, 1])
    assert made == stages[:2]


def test_what_the_labels_do_not_fit():
    module = jaxpipe.PipelineModule(MODULE.entries, lambda y, t: (y - t["missing"]).mean())
    mesh = jaxpipe.make_mesh()
    layout = Layout(module, (0, 6), PARAMS)
    with pytest.raises(DataError, match="The labels are None"):
        TrainPlan(layout, mesh, lower(schedules.gpipe(1, 2)), "layer", (make_batch(2)[0], None), None)
