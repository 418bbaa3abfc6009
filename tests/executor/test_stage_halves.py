"""A whole model as one stage: I and W together give what the backward in one gives, and what waits is where it should."""

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
from jaxpipe.model.context import Aux
from tests.compare import assert_close
from tests.executor.small import make_batch, prepared

KEY = jax.random.key(4, impl="rbg")
BATCH = make_batch(2)
SLOTS = 3


@pytest.mark.parametrize("remat", ["layer", "none"])
def test_input_and_weight_gradients(remat):
    layout, mesh, program, params = prepared((0, 6), schedules.zero_bubble(1, 2))
    plan = TrainPlan(layout, mesh, program, remat, BATCH, KEY)
    (program,), halves = plan.programs, plan.halves[0]
    plan.store.settle([SLOTS])
    plan.pending.settle([SLOTS])

    @jax.jit
    def run(params, ids, labels, key):
        both = Twice.of(plan.weights.enter(params, jnp.int32(0)))
        buffers, pending = (each.allocate(poison=True) for each in (plan.store, plan.pending))
        at = [jnp.int32(n) for n in (1, 0, 0, 0, 2)]
        micro_batch, seed = MicroBatch(key, ids, labels, *at), Seeds(jnp.float32(0.5))
        _, buffers, _ = program.forward(both.params, ids, micro_batch, buffers, Aux())
        grads = plan.weights.blank_gradients(both.params)
        _, dy, _, _ = program.loss_and_gradient(both.params, micro_batch, buffers, Aux(), grads, seed)
        _, whole = program.backward(both, dy, micro_batch, buffers, Aux(), grads)

        dx, pending, early = halves.input_gradient(both, dy, micro_batch, buffers, pending, Aux(), grads)
        late = halves.weight_gradient(both, micro_batch, buffers, pending, Aux(), early, seed)
        return late, whole, early, dx, pending, halves.spoil(pending, micro_batch)

    found, wanted, early, dx, pending, spoilt = run(params, BATCH[0][1], BATCH[1][1], KEY)
    assert_close(found, wanted, 1e-6)
    assert dx == [], "integers have no gradient"
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(early)), "no product of weights is in I"
    for name, buffer in pending.items():
        if jnp.issubdtype(buffer.dtype, jnp.inexact):
            own, after = buffer.reshape(SLOTS, -1), spoilt[name].reshape(SLOTS, -1)
            assert np.isnan(own[:2]).all() and not np.isnan(own[2]).any(), f"{name}: its own slot, and no other"
            assert np.isnan(after).all()


def test_a_plan_says_what_waits_and_what_cannot():
    """Bytes of the pool by hand, and the layer whose backward is one piece by its name."""

    def init(key, x):
        return {"w": jax.random.normal(key, (4, 4))}

    def chosen(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: jnp.sin(x @ p["w"]))

    product, whole = (
        jaxpipe.Layer(init, apply, name) for name, apply in (("Product", lambda p, x: x @ p["w"]), ("Chosen", chosen))
    )
    module = jaxpipe.PipelineModule([product, whole, product, product], lambda y, t: (y * t).mean(), [0, 2, 3, 4])
    batch = tuple(jax.ShapeDtypeStruct((4, 5, 4), jnp.float32) for _ in range(2))

    def plan_of(schedule):
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=3), 4, schedule)
        pipe.init(0, jnp.zeros((5, 4)))
        return pipe.plan(batch)

    plan = plan_of("zero_bubble")
    # Rank 0 has 1 micro-batch waiting at most, rank 1 has 2 and rank 2 has 3: input and gradient of a product, [5, 4] each.
    # (That of rank 0 is in the batch, so only the gradient waits there.)
    assert plan.program.pending_per_rank == (1, 2, 3)
    assert plan.bytes_per_rank()["pending"] == 3 * 2 * 5 * 4 * 4
    assert [label for label in plan.whole_in_i if "Chosen" in label] == plan.whole_in_i != []
    assert "pending" in str(plan)
    other = plan_of("1f1b")
    assert "pending" not in other.bytes_per_rank() and other.whole_in_i == []
