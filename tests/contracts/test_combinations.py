"""State, extra losses, frozen and tied layers, cut optimizer state, a further axis and a dynamic loss scale, all in one
engine: losses, params, state and the step that an overflow skips are those of a loop of optax around the oracle."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from tests.compare import assert_close

WIDTH, ROWS, M = 4, 8, 3


def normal(key, *shape):
    return jax.random.normal(key, shape) / shape[0] ** 0.5


def routed(params, x):
    y = x + jnp.tanh(x @ (params["base"] + params["adapter"]))
    return jaxpipe.LayerOut(y, {"balance": 0.3 * ((y**2).mean(0) ** 2).sum()}, {"size": jnp.abs(y).mean()})


def drifting(params, state, x, *, train):
    y = jnp.tanh(x @ (params["base"] + params["adapter"])) + 0.1 * state["mean"][None]
    new = {"mean": 0.9 * state["mean"] + 0.1 * x.mean(0), "calls": state["calls"] + 1}
    return jaxpipe.LayerOut(x + y, {"drift": 0.2 * (y.mean(0) ** 2).sum()}), new if train else state


def weights(key, x):
    return {"base": normal(key, WIDTH, WIDTH), "adapter": 0.1 * normal(jax.random.fold_in(key, 1), WIDTH, WIDTH)}


def with_state(key, x):
    return weights(key, x), {"mean": jnp.full(WIDTH, 0.3), "calls": jnp.int32(0)}


def routed_layer():
    return ROUTED


ROUTED = jaxpipe.Layer(weights, routed, "Routed")
DRIFTING = jaxpipe.Layer(with_state, drifting, "Drifting", stateful=True)
TIED = jaxpipe.TiedLayerSpec("shared", routed_layer)
HEAD = jaxpipe.Layer(lambda key, x: {"base": normal(key, WIDTH, 6)}, lambda p, x: x @ p["base"], "Head")
LAYERS = [TIED, DRIFTING, ROUTED, TIED, DRIFTING, DRIFTING, HEAD]


def loss(y, t):
    return ((y - t) ** 2).mean(), {"off": jnp.abs(y - t).mean()}


def batch_of(seed, factor=1.0):
    rng = np.random.default_rng(seed)
    t = rng.normal(size=(M, ROWS, 6)) * factor
    return rng.normal(size=(M, ROWS, WIDTH)).astype(np.float32), t.astype(np.float32)


def kept(engine):
    return jax.device_get((engine.state.params, engine.state.opt_state, engine.layer_state()))


@pytest.mark.parametrize(
    ("stages", "data", "cut", "axes"), [(3, 2, [0, 1, 4, 7], {}), (2, 1, [0, 3, 7], {"model": 2})], ids=["zero", "axis"]
)
def test_all_at_once(stages, data, cut, axes):
    module = jaxpipe.PipelineModule(
        LAYERS, loss, partition_method=cut, **({"sharding": [(".", P(None, "model"))]} if axes else {})
    )
    rule = "adapter|layer_001|layer_006"
    engine = jaxpipe.initialize(
        module,
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=stages, data=data, **axes),
        example=tuple(a[0] for a in batch_of(0)),
        config={
            "num_micro_batches": M,
            "zero_stage": data - 1,
            "loss_scale": jaxpipe.DynamicScale(initial=2.0**80),  # a power of 2 changes no bit
        },
        trainable=rule,
        key=3,
    )
    layers, states = jax.device_get((engine.to_layers(), engine.layer_state()))

    def trained(tree):
        """The leaves that are, by path."""
        found = {}
        for index, layer in enumerate(tree):
            for path, leaf in jax.tree_util.tree_leaves_with_path(layer):
                name = f"layer_{index:03d}/{jax.tree_util.keystr(path, simple=True)}"
                if re.search(rule, name):
                    found[name] = leaf
        return found

    tx = optax.adam(1e-2)
    opt_state = tx.init(trained(layers))
    for step, factor in enumerate([1.0, 1e18, 1.0, 1.0]):
        batch, before = batch_of(step, factor), kept(engine)
        found = engine.train_batch(zip(*batch, strict=True))
        if factor != 1.0:
            assert not np.isfinite(engine.grad_norm) and engine.skipped_steps == 1
            assert_close(kept(engine), before, 0, "what a skipped step leaves, state included")
            continue
        wanted, grads, states = jaxpipe.reference.value_and_grad(
            module, layers, batch, num_data_ranks=data, layer_state=states
        )
        assert_close(found, wanted, 1e-6, f"step {step}")
        params, grads = trained(layers), trained(grads)
        assert_close(engine.grad_norm, optax.tree.norm(grads), 1e-6, "norm")
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        for name, leaf in params.items():
            number, key = name.split("/")
            layers[int(number[-3:])][key] = np.asarray(leaf)
    assert_close(jax.device_get(engine.to_layers()), layers, 1e-5, "params")
    assert_close(jax.device_get(engine.layer_state()), jax.device_get(states), 1e-6, "state")
    assert int(states[1]["calls"]) == 3 * M
    reported = {"loss", "grad_norm", "loss_scale", "balance", "drift", "size", "off"}
    assert set(engine.metrics) == reported
    evaluated = engine.evaluate([tuple(a[m] for a in batch_of(9)) for m in range(M)])
    assert reported - {"grad_norm", "loss_scale"} == set(evaluated)
