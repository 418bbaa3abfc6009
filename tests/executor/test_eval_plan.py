"""What an evaluation will do, from shapes alone."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe import metrics, schedules
from jaxpipe.errors import LossError
from jaxpipe.executor.eval_plan import EvalPlan, rows_everywhere
from jaxpipe.executor.options import Options
from jaxpipe.layout.layout import Layout
from jaxpipe.lowering.lower import lower
from jaxpipe.processes.group import Group
from tests.executor.small import LAYERS, MODULE, make_batch

PARAMS = [each.params for each in MODULE.shapes(jax.ShapeDtypeStruct((4,), jnp.int32))]
CUTS = (0, 1, 3, 6)


def plan_of(cuts=CUTS, micro_batches=3, module=MODULE, data=1, **options):
    stages = len(cuts) - 1
    mesh = jaxpipe.make_mesh(pipe=stages, data=data)
    program = lower(schedules.forward_only(stages, micro_batches))
    return EvalPlan(Layout(module, cuts, PARAMS), mesh, program, make_batch(micro_batches), Options(**options))


def concat(y, t):
    return {"rows": metrics.Concat(y[:, 0])}


@pytest.mark.parametrize(
    ("case", "shares"),
    [
        ({"spread": True}, True),
        ({"spread": False}, False),
        ({"spread": True, "cuts": (0, 6)}, False),
        ({"spread": True, "broadcast": False}, False),
        ({"spread": True, "outputs": True}, False),
        ({"spread": True, "metrics": True, "metrics_fn": concat}, False),
        ({"spread": True, "micro_batches": 1}, True),
        ({"cuts": (0, 1, 2, 6)}, True),  # the last stage has most of the work
        ({"cuts": (0, 2, 5, 6)}, False),  # the cut has already made room for the head
        ({"cuts": (0, 2, 4, 6), "micro_batches": 1}, False),  # nobody to share it with
    ],
    ids=itertools.count(),
)
def test_who_runs_the_tail(case, shares):
    plan = plan_of(**case)
    assert (plan.tail is not None) == shares
    last = plan.programs[plan.program_ids[-1]]
    if shares:
        assert plan.tail.inputs["h"].shape == (4, 3) and plan.tail.run.outputs[0].shape == (4, 3)
        assert last.run.outputs[0]["h"].shape == (4, 3), "F of the last rank stops before the tail"
    else:
        assert last.run.outputs[0].shape == (4, 3)
    assert plan.outputs == jax.ShapeDtypeStruct((4, 3), jnp.float32)


def test_sharing_pays_where_the_tail_is_most_of_the_last_stage():
    """By FLOPs: a head of six blocks behind a single block, on three ranks."""

    def heavy(p, x):
        h = x["h"]
        for _ in range(6):
            h = jnp.tanh(h @ p["w"])
        return h

    module = jaxpipe.PipelineModule([*LAYERS[:5], jaxpipe.Layer(LAYERS[5].init, heavy, "Heavy")], MODULE.loss_fn)
    assert plan_of((0, 2, 4, 6), module=module).tail is not None
    assert plan_of((0, 2, 4, 6), module=module, micro_batches=1).tail is None


def test_distinct_stages_and_what_travels():
    plan = plan_of((0, 1, 2, 3, 6), data=2)
    assert plan.program_ids == [0, 1, 1, 2]
    assert [(leaf.shape, leaf.dtype) for leaf in plan.codec.spec] == [((2, 3), jnp.float32), ((2,), jnp.int32)]


def test_outputs_without_rows_cannot_be_returned():
    module = jaxpipe.PipelineModule([*LAYERS[:5], lambda x: x["h"].sum()])
    layout = Layout(module, (0, 6), [*PARAMS[:5], {}])
    program = lower(schedules.forward_only(1, 2))
    with pytest.raises(LossError, match=r"first dim is the rows of the micro-batch \(4 on each data rank\)"):
        EvalPlan(layout, jaxpipe.make_mesh(), program, make_batch(2), Options(outputs=True))
    EvalPlan(layout, jaxpipe.make_mesh(), program, make_batch(2), Options())  # as the loss it is fine


def test_values_per_row_come_to_all_processes(monkeypatch):
    assert not rows_everywhere(jaxpipe.make_mesh(pipe=2), Options()), "one process can read them where they are"
    monkeypatch.setattr(Group, "of", lambda mesh: SimpleNamespace(several=True))
    assert rows_everywhere(jaxpipe.make_mesh(pipe=2), Options())
    assert not rows_everywhere(jaxpipe.make_mesh(pipe=2), Options(broadcast=False))
    assert plan_of().rows_everywhere
