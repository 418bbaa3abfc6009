"""Micro-batches of unlike rows and lengths: exact with the helper, refused with that way out without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import DataError
from jaxpipe.executor.reference import forward
from tests.compare import assert_close
from tests.engines import M, engine_for
from tests.models import VOCAB, tied

SHAPES = [(4, 5), (3, 7), (4, 2), (1, 6)]  # rows and lengths, the last one of a step of its own


def loss_fn(logits, labels_and_weights):
    labels, weights = labels_and_weights
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jaxpipe.Weighted((each * weights).sum(), weights.sum())


def micro_batches():
    rng = np.random.default_rng(1)
    return [(rng.integers(0, VOCAB, shape), rng.integers(0, VOCAB, shape)) for shape in SHAPES]


def by_hand(module, layers, items, rate):
    """Loss and weights after one step of plain gradient descent, over the real tokens only."""

    def mean(layers):
        each = [
            optax.softmax_cross_entropy_with_integer_labels(forward(module, layers, x), y).ravel() for x, y in items
        ]
        return jnp.concatenate(each).mean()

    loss, grads = jax.value_and_grad(mean)(layers)
    return loss, jax.tree.map(lambda a, g: a - rate * g, layers, grads)


def make_engine(stages, data):
    module = tied(loss=loss_fn, num_blocks=3)
    blank = np.zeros((4, 7), np.int32)
    return jaxpipe.initialize(
        module,
        optax.sgd(0.3),
        mesh=jaxpipe.make_mesh(pipe=stages, data=data),
        example=(blank, (blank, np.ones((4, 7), np.float32))),
        config={"num_micro_batches": M},
        key=jax.random.key(5),
    )


@pytest.mark.parametrize(("stages", "data"), [(1, 1), (2, 2)])
def test_steps_of_unlike_micro_batches_are_those_of_the_real_tokens(stages, data):
    items = micro_batches()
    engine = make_engine(stages, data)
    plain = jaxpipe.Pipeline(engine.pipe.module, engine.pipe.mesh, M)
    params = plain.from_layers(engine.to_layers())
    layers = jax.device_get(engine.to_layers())
    for step in (items[:3], items[3:]):  # the last step has one micro-batch of one row
        alike = jaxpipe.pad_micro_batches(step, num_micro_batches=M, rows=4, multiple_of=8)
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *alike)
        loss, grads = plain.value_and_grad(params, batch)
        params = jax.tree.map(lambda a, g: a - 0.3 * g, params, grads)
        wanted, layers = by_hand(engine.pipe.module, layers, step, 0.3)
        assert_close(loss, wanted, 1e-5, "loss")
        assert_close(jax.device_get(plain.to_layers(params)), layers, 1e-5, "weights")
        assert_close(
            plain.evaluate(params, batch), by_hand(engine.pipe.module, layers, step, 0.3)[0], 1e-5, "evaluation"
        )


def test_shapes_compile_once_each_and_many_are_warned_of(no_compiles):
    head = jaxpipe.Layer(lambda key, x: jnp.eye(VOCAB), lambda table, ids: table[ids])
    blank = np.zeros((2, 7), np.int32)
    engine = jaxpipe.initialize(
        jaxpipe.PipelineModule([head], loss_fn),
        optax.sgd(0.1),
        mesh=jaxpipe.make_mesh(),
        example=(blank, (blank, np.ones((2, 7), np.float32))),
        config={"num_micro_batches": M},
    )

    def step(length):
        blank = np.zeros((2, length), np.int32)
        return engine.train_batch(iter([(blank, (blank, np.ones((2, length), np.float32)))] * M))

    for length in range(2, 10):
        step(length)
    with no_compiles():
        step(3), step(9)
    with pytest.warns(UserWarning, match="9 shapes of training batches"):
        step(11)
    step(12)
    with pytest.warns(UserWarning, match="9 shapes of evaluation batches"):
        for length in range(2, 11):
            blank = np.zeros((2, length), np.int32)
            engine.eval_batch(iter([(blank, (blank, np.ones((2, length), np.float32)))]), num_micro_batches=1)


def test_without_the_helper_they_are_refused_and_it_is_named():
    engine = engine_for(tied())
    with pytest.raises(DataError, match="jaxpipe.pad_micro_batches"):
        engine.train_batch(iter(micro_batches()))
    with pytest.raises(DataError, match="jaxpipe.pad_micro_batches"):
        engine.train_batch(iter(micro_batches()[:1]))
    with pytest.raises(DataError, match="jaxpipe.pad_micro_batches"):
        engine.eval_batch(iter(micro_batches()))
