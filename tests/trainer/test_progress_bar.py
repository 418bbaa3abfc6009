import io
import re

import numpy as np
import optax
from flax import nnx

import jaxpipe
from jaxpipe.trainer.progress_bar import ProgressBar
from tests.trainer.runs import FakeRun, result

CHIP = {"peak_flops": 1.0, "memory": 1.0, "bandwidth": 1.0, "link": 1.0}


def test_lines_of_a_run_that_goes_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jaxpipe.monitor.progress.time.monotonic", lambda: now[0])
    module = jaxpipe.PipelineModule(
        [jaxpipe.LayerSpec(nnx.Linear, 8, 8)], lambda y, t: optax.squared_error(y, t).mean()
    )
    x = np.ones((4, 8), np.float32)
    mesh, config = jaxpipe.make_mesh(pipe=1), {"num_micro_batches": 2}
    engine = jaxpipe.initialize(module, optax.sgd(0.1), mesh=mesh, example=(x, x), config=config)
    out, run = io.StringIO(), FakeRun(engine, steps=60, began=50)
    bar = ProgressBar(stream=out, chip={**CHIP, "peak_flops": 1e3}, tokens_per_step=4000)
    bar.on_start(run)
    for step in range(51, 54):
        now[0] += 20.0
        bar.on_step(run, step, {"loss": 1.0 / step})
    bar.on_evaluate(run, 53, {"loss": 0.5, "rows": np.ones(3)})
    bar.on_end(run, result())
    first, *lines = out.getvalue().splitlines()
    assert first == "going on behind step 50"
    assert lines[0] == "step 51/60  loss 0.020"
    # Two micro-batches with two products [4, 8] x [8, 8] each, and a bias, in 20 s.
    assert re.fullmatch(r"step 52/60  loss 0.019  200 tokens/s  1[01] % of peak  2:40 left", lines[1])
    assert lines[3] == "step 53: evaluation: loss 0.5"
    assert lines[-1] == "ended after step 4: all 4 steps are done"
