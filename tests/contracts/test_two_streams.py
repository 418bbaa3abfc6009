"""Encoder and decoder, and two towers: loss, gradients, five steps and evaluation are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.model.context import Context
from tests.compare import assert_close
from tests.two_streams import contrastive, encoder_decoder, pairs, translations, two_towers

M = 3
MODELS = {"encoder_decoder": (encoder_decoder, translations), "two_towers": (two_towers, pairs)}


def whole(module, layers, batch):
    """The mean loss over micro-batches, each on all rows at once, by a plain loop."""

    def run(layers):
        losses = []
        for m in range(M):
            x, labels = jax.tree.map(lambda a, m=m: jnp.asarray(a[m]), batch)

            def one(x=x, labels=labels):
                for index, layer in enumerate(module.layers):
                    x, _ = layer.apply(layers[module.owners[index]], x, Context(), True)
                return module.loss_fn(x, labels)

            losses.append(jax.vmap(lambda _, one=one: one(), axis_name="data")(jnp.zeros(1))[0])
        return jnp.stack(losses).mean()

    return jax.jit(jax.value_and_grad(run))(layers)


CASES = [
    ("encoder_decoder", 1, 2, "uniform", "none"),
    ("encoder_decoder", 2, 1, [0, 2, 9], "layer"),
    ("encoder_decoder", 4, 2, [0, 1, 5, 6, 9], "none"),
    ("encoder_decoder", 4, 1, "uniform", "layer"),
    ("two_towers", 1, 1, "uniform", "layer"),
    ("two_towers", 2, 2, "uniform", "layer"),
    ("two_towers", 4, 2, [0, 1, 2, 4, 5], "none"),
]


@pytest.mark.parametrize(("model", "stages", "data", "cut", "remat"), CASES)
def test_loss_gradients_and_evaluation(model, stages, data, cut, remat):
    make, batches = MODELS[model]
    module, batch = make(cut), batches(M)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages, data=data), M, remat=remat, poison=True)
    params = pipe.init(2, jax.tree.map(lambda a: a[0], batch[0]))
    loss, grads = pipe.value_and_grad(params, batch)
    wanted, wanted_grads = whole(module, jax.device_get(pipe.to_layers(params)), batch)
    assert_close(loss, wanted, 1e-6, "loss")
    # The gradients of the keys are small beside what they are summed of: up to 3e-6 of rounding has been seen.
    assert_close(pipe.to_layers(grads), wanted_grads, 5e-6, "gradient of layer ")
    assert_close(pipe.evaluate(params, batch), wanted, 1e-6, "evaluation")


@pytest.mark.parametrize(("model", "stages", "data"), [("encoder_decoder", 4, 1), ("two_towers", 2, 2)])
def test_five_steps(model, stages, data):
    make, batches = MODELS[model]
    module, tx = make(), optax.adam(1e-2)
    example = jax.tree.map(lambda a: a[0], batches(1))
    mesh = jaxpipe.make_mesh(pipe=stages, data=data)
    engine = jaxpipe.initialize(module, tx, mesh=mesh, example=example, config={"num_micro_batches": M}, key=2)
    layers = jax.device_get(engine.to_layers())
    state = tx.init(layers)
    for step in range(5):
        batch = batches(M, seed=step)
        loss = engine.train_batch(iter([jax.tree.map(lambda a, m=m: a[m], batch) for m in range(M)]))
        wanted, grads = whole(module, layers, batch)
        assert_close(loss, wanted, 1e-5, f"loss of step {step}")
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, layers)
            layers = optax.apply_updates(layers, updates)
    assert_close(jax.device_get(engine.to_layers()), jax.device_get(layers), 2e-5, "weights of layer ")


def test_the_loss_of_one_rank_alone_would_be_another():
    """What the case above is about: texts of the other data rank are among those that a picture is told apart from."""
    towers, labels = jax.tree.map(lambda a: a[0], pairs(1))

    def loss(rows):
        part = jax.tree.map(lambda a: a[rows], (towers, labels))
        return jax.vmap(lambda _: contrastive(*part), axis_name="data")(jnp.zeros(1))[0]

    halves = np.mean([loss(slice(0, 2)), loss(slice(2, 4))])
    assert abs(halves - loss(slice(0, 4))) > 0.1
