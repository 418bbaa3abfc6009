"""The FLOPs of layers, against products counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.executor.remat import recomputing
from jaxpipe.model.costs import Costs
from jaxpipe.model.module import PipelineModule

X = np.ones((4, 8), np.float32)
ONE = 2 * 4 * 8 * 8  # FLOPs of a product [4, 8] x [8, 8]


def two_products(name):
    """x -> (x @ a) @ b. Its backward needs x @ a, a, b and x."""

    def init(key, x):
        return {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}

    return jaxpipe.Layer(init, lambda p, x: (x @ p["a"]) @ p["b"], name)


def other(name):
    """A layer of another kind with the same products."""
    layer = two_products(name)
    return jaxpipe.Layer(layer.init, lambda p, x: x @ p["b"] @ p["a"], name)


def shapes_of(layers):
    module = PipelineModule(layers)
    return module, module.shapes(X)


@pytest.mark.parametrize(
    ("remat", "made_again"),
    [("none", 0), ("dots", 0), ("layer", 1), ("stage", 1), (2, 1), (jax.checkpoint_policies.nothing_saveable, 1)],
    ids=["none", "dots", "layer", "stage", "interval", "policy"],
)
def test_a_training_step_counts_backward_and_recomputation(remat, made_again):
    module, shapes = shapes_of([two_products("block")] * 3 + [jnp.tanh, other("head")])
    costs = module.costs.training(shapes, recomputing(remat))
    # Forward, the gradients of two weights, and of the inputs of two products; the first layer has one of those less.
    # (A policy marks what it keeps, which XLA counts as work: a few FLOPs per element.)
    assert costs[1] == costs[2] == pytest.approx((2 + 4 + made_again) * ONE, abs=ONE / 10)
    assert costs[0] == pytest.approx((2 + 3 + made_again) * ONE, abs=ONE / 10)
    assert costs[4] == (2 + 4) * ONE  # the tail runs once, whatever is kept
    assert costs[3] < ONE
    assert module.costs.forward(shapes) == [2 * ONE, 2 * ONE, 2 * ONE, 0, 2 * ONE]


def test_the_tail_ends_at_the_last_layer_of_a_stack():
    module, shapes = shapes_of([other("embed"), two_products("block"), two_products("block")])
    again = recomputing("layer")
    assert module.costs.training(shapes, again)[1:] == [7 * ONE] * 2


def test_integers_and_tied_layers():
    def embed(p, ids):
        return p["table"][ids]

    def attend(p, x):
        return x @ p["table"].T

    table = lambda key, x: {"table": jnp.ones((16, 8))}  # noqa: E731
    module = PipelineModule(
        [
            jaxpipe.TiedLayerSpec("table", jaxpipe.Layer, table, embed, "embed"),
            two_products("block"),
            two_products("block"),
            jaxpipe.TiedLayerSpec("table", jaxpipe.Layer, table, embed, "embed", forward_fn=attend),
        ]
    )
    shapes = module.shapes(np.zeros((4,), np.int32))
    costs = module.costs.training(shapes)
    assert costs[0] < ONE and costs[3] == 3 * 2 * 4 * 8 * 16


def test_a_backward_that_fails_does_not_stop_the_count():
    @jax.custom_vjp
    def odd(x):
        return x * 1.0

    odd.defvjp(lambda x: (odd(x), None), lambda kept, dy: 1 / 0)
    module, shapes = shapes_of(
        [two_products("block"), jaxpipe.Layer(lambda k, x: {}, lambda p, x: odd(x), "odd"), two_products("block")]
    )
    costs = Costs(module).training(shapes)
    assert costs[1] == 3 * Costs(module).forward(shapes)[1]


def test_what_xla_cannot_count_costs_nothing():
    def shift(x):
        return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]

    def printed(x):
        return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    module, shapes = shapes_of([two_products("block"), shift, printed, two_products("block")])
    assert min(module.costs.training(shapes) + module.costs.forward(shapes)) == 0
    assert module.partition(2, X) in [(0, 1, 4), (0, 2, 4), (0, 3, 4)]
