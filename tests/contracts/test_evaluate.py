"""`evaluate` and `eval_batch`: values, places, shapes, and that calls never interfere."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, DataError
from jaxpipe.executor.reference import forward
from tests.compare import assert_close
from tests.models import MODELS, VOCAB, make_batch, masked_cross_entropy, tied


def oracle(module, layers, batch):
    """Per micro-batch outputs, and total and weight of each, on one device."""
    layers = jax.device_put(jax.device_get(layers), jax.devices()[0])
    run = jax.jit(lambda x: forward(module, layers, x))
    outputs = [run(x) for x in batch[0]]
    terms = [module.loss_fn(y, t) for y, t in zip(outputs, batch[1], strict=True)]
    terms = [
        (term.total, term.weight) if isinstance(term, jaxpipe.Weighted) else (term, jnp.ones(())) for term in terms
    ]
    return np.stack(outputs), np.stack([t for t, _ in terms]), np.stack([w for _, w in terms])


@pytest.mark.parametrize(
    ("model", "stages", "data", "micro_batches"),
    [("tied", 4, 2, 3), ("untied", 3, 1, 8), ("mixed", 8, 2, 2), ("untied", 1, 2, 3), ("mixed", 2, 1, 1)],
)
def test_values_of_every_option(model, stages, data, micro_batches):
    module = MODELS[model]()
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages, data=data), num_micro_batches=5)
    batch = make_batch(micro_batches)
    params = pipe.init(jax.random.key(1), batch[0][0])
    outputs, total, weight = oracle(module, pipe.to_layers(params), batch)
    each = total / weight
    wanted = {"avg": total.sum() / weight.sum(), "sum": each.sum(), None: each}

    last_devices = set(pipe.mesh.devices[-1].flat)
    for reduce_output, broadcast in itertools.product(wanted, (True, False)):
        loss = pipe.evaluate(params, batch, reduce_output=reduce_output, bcast_loss=broadcast)
        assert_close(loss, wanted[reduce_output], 1e-6, f"{reduce_output}, broadcast {broadcast}")
        assert loss.sharding.device_set == (set(pipe.mesh.devices.flat) if broadcast else last_devices)
    loss, logits = pipe.evaluate(params, batch, return_logits=True)
    assert_close((loss, logits), (wanted["avg"], outputs), 1e-6)
    only = pipe.evaluate(params, (batch[0], None), compute_loss=False)
    assert_close(only, outputs, 1e-6)
    # Held once: on the last rank's devices, rows over its data ranks.
    assert logits.sharding.device_set == last_devices
    assert {shard.data.shape[:2] for shard in logits.addressable_shards} == {(micro_batches, 4 // data)}


@pytest.fixture(scope="module")
def engine():
    module = tied(loss=masked_cross_entropy)
    example = tuple(a[0] for a in make_batch(1))
    return jaxpipe.initialize(
        module,
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=4, data=2),
        example=example,
        config={"num_micro_batches": 3},
        key=jax.random.key(3),
    )


def micro_batches(num, **options):
    return list(zip(*make_batch(num, **options), strict=True))


def test_mixed_calls_do_not_interfere(engine, no_compiles):
    """The order of calls that breaks the original: other options, shapes and counts between training steps."""

    def calls():
        out = [engine.train_batch(iter(micro_batches(3)))]
        out += [engine.eval_batch(iter(micro_batches(3)))]
        out += [engine.eval_batch(iter(micro_batches(3)), compute_loss=False)]
        out += [engine.eval_batch(iter(micro_batches(3)), reduce_output=None)]
        out += [engine.eval_batch(iter(micro_batches(2, rows=6, length=3)), return_logits=True, num_micro_batches=2)]
        out += [engine.train_batch(iter(micro_batches(3)))]
        out += [engine.eval_batch(iter(micro_batches(3)), bcast_loss=False)]
        return jax.block_until_ready(out)

    first = calls()
    assert first[2].shape == (3, 4, 5, VOCAB) and first[3].shape == (3,)
    assert first[4][0].shape == () and first[4][1].shape == (2, 6, 3, VOCAB)
    with no_compiles():
        second = calls()
    assert second[5] < first[5] < first[0], "training goes on between evaluations"
    again = engine.eval_batch(iter(micro_batches(3)))
    assert again == engine.eval_batch(iter(micro_batches(3))), "evaluation is deterministic: no dropout, no state"
    assert float(again) == float(second[6]), "bcast_loss changes the place, not the value"


def test_inside_the_callers_jit(engine):
    batch = make_batch(3)
    params = engine.state.params
    loss, logits = jax.jit(lambda p, b: engine.pipe.evaluate(p, b, return_logits=True))(params, batch)
    wanted = engine.pipe.evaluate(params, batch, return_logits=True)
    assert_close((loss, logits), wanted, 1e-6)


def test_arguments_are_checked(engine):
    params, batch = engine.state.params, make_batch(3)
    with pytest.raises(ConfigError, match='reduce_output=\'mean\': it is "avg", "sum" or None'):
        engine.pipe.evaluate(params, batch, reduce_output="mean")
    with pytest.raises(DataError, match=r"inputs is int32\[3,4,5\]: its first dim is 3, but there are 2 micro-batches"):
        engine.pipe.evaluate(params, batch, num_micro_batches=2)
    with pytest.raises(DataError, match="The labels are None, but loss_fn needs them: .*compute_loss=False"):
        engine.pipe.evaluate(params, (batch[0], None))
    with pytest.raises(DataError, match="ended after 3 of 4 micro-batches"):
        engine.eval_batch(iter(micro_batches(3)), num_micro_batches=4)
