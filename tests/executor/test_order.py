"""Schedules that change the order of the micro-batches, and layers with state."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Schedule

# F of micro-batch 1 first, then those of 0; and the same for the backwards.
FORWARDS = "0F1,0F0,,,0B1,0B0\n,1F1,1F0,1B1,1B0,\n"
BACKWARDS = "0F0,0F1,,,0B1,0B0\n,1F0,1F1,1B1,1B0,\n"


def init(key, x):
    return {"w": jnp.ones(3)}, {"n": jnp.int32(0)}


def module(stateful, changes=True):
    def apply(p, s, x):
        return x * p["w"][None], {"n": s["n"] + 1} if changes else s

    counts = jaxpipe.Layer(init, apply, "Counts", stateful=True)
    plain = jaxpipe.Layer(lambda key, x: {"w": jnp.ones(3)}, lambda p, x: x * p["w"][None], "Plain")
    layers = [counts if index in stateful else plain for index in range(4)]
    return jaxpipe.PipelineModule(layers, lambda y, t: y.mean(), partition_method=[0, 2, 4])


def check(module, schedule):
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 2, Schedule.from_csv(schedule))
    example = np.ones((2, 3), np.float32)
    pipe.check((example, example))


@pytest.mark.parametrize(
    ("stateful", "schedule", "message"),
    [
        ({0}, FORWARDS, r"runs the forwards of stage 0 in the order \[1, 0\], but layer 0 \(Counts\) has state"),
        ({0, 2}, FORWARDS, "stage 0"),
        ({3}, BACKWARDS, r"runs the backwards \(which run the last layers\) of stage 1 in the order \[1, 0\]"),
    ],
)
def test_another_order_is_refused(stateful, schedule, message):
    with pytest.raises(ScheduleError, match=message):
        check(module(stateful), schedule)


def test_order_does_not_matter_where_nothing_is_changed():
    check(module(set()), FORWARDS)
    check(module({0}, changes=False), FORWARDS)
    check(module({0}), BACKWARDS), "forwards are in order, and nothing behind them has state"
