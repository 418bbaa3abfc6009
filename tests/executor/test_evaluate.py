"""Evaluations over two ranks and two data ranks, against plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import metrics, schedules
from jaxpipe.executor.eval_plan import EvalPlan
from jaxpipe.executor.evaluate import evaluate
from jaxpipe.executor.options import Options
from tests.compare import assert_close
from tests.executor.small import BLOCK, LAYERS, loss, make_batch, prepared

DATA = 2


def named(y, t):
    return {"max": metrics.Max(y.max()), "rows": metrics.Concat(y[:, 0])}


def run(cuts, micro_batches, real=None, **options):
    """(what was found, outputs, labels), the latter two of plain functions, per micro-batch."""
    module = jaxpipe.PipelineModule(LAYERS, loss)
    schedule = schedules.forward_only(len(cuts) - 1, micro_batches)
    layout, mesh, program, params = prepared(cuts, schedule, data=DATA, module=module)
    batch = make_batch(micro_batches)
    plan = EvalPlan(layout, mesh, program, batch, Options(**options))
    found = jax.jit(lambda params, batch, real: evaluate(plan, params, batch, real))(params, batch, real)

    def forward(x):
        for layer, held in zip(LAYERS, layers, strict=True):
            x = layer.apply(held, x, **({"key": None} if layer is BLOCK else {}))
        return x

    layers = jax.tree.map(jnp.asarray, jax.device_get(layout.to_layers(params)))
    outputs = np.asarray(jax.jit(forward)(batch[0].reshape(-1)))
    return found, outputs.reshape(batch[1].shape), batch[1]


@pytest.mark.parametrize("spread", [False, True], ids=["last rank", "shared"])
def test_one_loss_per_micro_batch(spread):
    """Five micro-batches on three ranks: the last turn of the tail has no work for one of them."""

    def count(y, t):
        return {"rows": metrics.Sum(y.shape[0])}

    found, y, t = run((0, 2, 3, 6), 5, spread=spread, reduce_output=None, metrics=True, metrics_fn=count)
    assert_close(found.loss, ((y - t) ** 2).mean((1, 2)), 2e-6)
    assert found.metrics == {"rows": 5 * 4} and found.outputs is None and not found.rows


def test_outputs_metrics_and_rows_lie_with_the_last_rank():
    found, y, t = run((0, 4, 6), 3, outputs=True, metrics=True, metrics_fn=named, broadcast=False)
    assert found.loss.shape == (2,) and found.outputs.shape == (2 * 3, 4, 3), "one per rank, the last one counts"
    assert_close(found.loss[-1], ((y - t) ** 2).mean(), 2e-6)
    assert_close(found.outputs[-3:], y, 1e-6)
    assert_close(found.metrics["max"][-1], y.max(), 1e-6)
    assert_close(found.rows["rows"][-3:], y[..., 0], 1e-6)


def test_rows_of_data_ranks_that_do_not_count():
    """One stage, M = 1: the rows of the second data rank are repetitions."""
    found, y, t = run((0, 6), 1, np.asarray([True, False]), raw=True, metrics=True, metrics_fn=named)
    assert_close(found.loss, (2 * ((y - t) ** 2)[:, :2].mean((1, 2)), np.full(1, 2, np.float32)), 2e-6)
    assert_close(found.metrics["max"].terms[0], y[:, :2].max(), 1e-6)
