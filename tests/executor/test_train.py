"""A step over two ranks and two data ranks, against `jax.value_and_grad` of one plain function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import schedules
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.executor.train import StepResult, value_and_grad
from tests.compare import assert_close
from tests.executor.small import BLOCK, LAYERS, make_batch, prepared


def forward(layers, ids):
    x = ids
    for layer, params in zip(LAYERS, layers, strict=True):
        x = layer.apply(params, x, **({"key": None} if layer is BLOCK else {}))
    return x


def plain(layers, batch, weighted):
    """All rows of all micro-batches at once."""
    ids, labels = (a.reshape(-1, *a.shape[2:]) for a in batch)
    each = ((forward(layers, ids) - labels) ** 2).mean(-1)
    counts = counted(labels) if weighted else jnp.ones_like(each)
    return (each * counts).sum() / counts.sum()


def counted(labels):
    return (labels[:, 0] > -0.2).astype(jnp.float32)


def masked(y, t):
    """Every micro-batch and data rank has another weight, so that a mean of means would be wrong."""
    return jaxpipe.Weighted((((y - t) ** 2).mean(-1) * counted(t)).sum(), counted(t).sum())


@pytest.mark.parametrize(
    ("cuts", "micro_batches", "weighted"), [((0, 2, 6), 1, True), ((0, 6), 3, False)], ids=["M < S", "S = 1"]
)
def test_the_mean_over_micro_batches_and_data_ranks(cuts, micro_batches, weighted):
    module = jaxpipe.PipelineModule(LAYERS, masked if weighted else lambda y, t: ((y - t) ** 2).mean())
    schedule = schedules.one_f_one_b(len(cuts) - 1, micro_batches)
    layout, mesh, program, params = prepared(cuts, schedule, data=2, module=module)
    batch = make_batch(micro_batches)
    plan = TrainPlan(layout, mesh, program, "layer", batch, None)
    result = jax.jit(lambda params, batch: value_and_grad(plan, params, batch, None, poison=True))(params, batch)
    layers = jax.device_get(layout.to_layers(params))
    wanted, gradients = jax.jit(jax.value_and_grad(plain, allow_int=True), static_argnums=2)(layers, batch, weighted)
    assert isinstance(result, StepResult)
    assert_close(result.loss, wanted, 1e-6)
    for found, gradient in zip(layout.to_layers(result.grads), gradients, strict=True):
        assert_close(found["w"], gradient["w"], 3e-6)
        assert found["n"].dtype == jnp.int32 and found["n"] == 0
    for leaf, wanted in zip(jax.tree.leaves(result.grads), jax.tree.leaves(layout.shardings(mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


def test_where_nothing_counts_loss_and_gradients_are_zero():
    """The backward passes start from 1 / weight, taken for 0 then; infinities of the labels do not come through."""
    module = jaxpipe.PipelineModule(LAYERS, masked)
    layout, mesh, program, params = prepared((0, 6), schedules.one_f_one_b(1, 1), module=module)
    ids, labels = make_batch(1)
    plan = TrainPlan(layout, mesh, program, "none", (ids, labels), None)
    step = jax.jit(lambda labels: value_and_grad(plan, params, (ids, labels), None))
    assert step(labels).loss > 0
    loss, grads, *_ = step(np.full_like(labels, -9))
    assert loss == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    _, grads, *_ = step(np.full_like(labels, -np.inf))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
