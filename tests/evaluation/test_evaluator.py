"""Evaluation programs: one per shape, of any numbers of rows, with results where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import metrics
from jaxpipe.evaluation.evaluator import Evaluator, with_places
from jaxpipe.executor.options import Options
from jaxpipe.layout.layout import Layout
from tests.compare import assert_close

WIDTH = 3
DENSE = jaxpipe.Layer(lambda key, x: {}, lambda p, x: x @ p["w"], "Dense")


def loss(y, t):
    return ((y - t) ** 2).mean()


def named(y, t):
    return {"first": metrics.Concat(y[:, 0])}


MODULE = jaxpipe.PipelineModule([DENSE, DENSE], loss)
rng = np.random.default_rng(0)
LAYERS = [{"w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)} for _ in range(2)]
MESH = jaxpipe.make_mesh(pipe=2, data=2)
LAYOUT = Layout(MODULE, (0, 1, 2), LAYERS)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(lambda: LAYOUT, MESH)


@pytest.fixture(scope="module")
def params():
    return LAYOUT.from_layers(MESH, LAYERS)


def make(*sizes):
    """Groups of one micro-batch each, with so many rows."""
    return [tuple(rng.normal(size=(1, rows, WIDTH)).astype(np.float32) for _ in range(2)) for rows in sizes]


def wanted(groups):
    y = [group[0][0] @ LAYERS[0]["w"] @ LAYERS[1]["w"] for group in groups]
    return y, [((a - t[0]) ** 2).mean(1) for a, (_, t) in zip(y, groups, strict=True)]


def test_rows_that_do_not_divide(evaluator, params, no_compiles):
    options = Options(outputs=True, metrics=True, metrics_fn=named)
    groups = make(2, 3)
    found = evaluator.run(params, groups, options)
    y, each = wanted(groups)
    assert_close(found.loss, np.concatenate(each).mean(), 2e-6)
    assert_close(found.rows["first"], np.concatenate(y)[:, 0], 2e-6)
    assert found.outputs.shape == (2, 3, WIDTH)
    assert_close(found.outputs[1], y[1], 2e-6)
    assert_close(found.outputs[0], np.concatenate([y[0], np.zeros((1, WIDTH), np.float32)]), 2e-6)
    with no_compiles():
        evaluator.run(params, make(2, 3), options)


def test_without_broadcast_results_lie_on_the_last_rank(evaluator, params):
    (group,) = make(4)
    found = evaluator.run(params, [group], Options(outputs=True, broadcast=False, reduce_output=None))
    y, each = wanted([group])
    last = set(MESH.devices[-1].flat)
    assert found.loss.sharding.device_set == found.outputs.sharding.device_set == last
    assert_close((found.loss, found.outputs), (np.stack([each[0].mean()]), y[0][None]), 2e-6)
    assert {shard.data.shape for shard in found.outputs.addressable_shards} == {(1, 2, WIDTH)}


def test_lowered_from_shapes(evaluator, params):
    batch = tuple(jax.ShapeDtypeStruct((2, 4, WIDTH), jnp.float32) for _ in range(2))
    abstract = with_places(LAYOUT.shapes(), LAYOUT.shardings(MESH))
    assert jax.tree.map(lambda a: a.sharding, abstract) == LAYOUT.shardings(MESH)
    text = evaluator.trace(abstract, batch, Options()).lower().as_text()
    assert "collective_permute" in text and "transpose" not in text
