"""Saved here, loaded there: bit-identical at every mesh and cut; training goes on as if nothing had happened.

What the different optimizers keep is tested in `test_optimizer_checkpoints`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from tests.checkpoint.on_disk import arrays_of, assert_identical
from tests.compare import assert_close
from tests.engines import M, batches, engine_for, stream
from tests.models import masked_cross_entropy, mixed, tied, untied

# Stages, data ranks, partition: even and uneven, with padded stacks among them.
MESHES = [
    (1, 1, "uniform"),
    (1, 2, "uniform"),
    (2, 1, [0, 5, 9]),
    (3, 2, [0, 1, 2, 9]),
    (4, 1, [0, 1, 4, 8, 9]),
    (4, 2, "uniform"),
]


@pytest.mark.parametrize(("make", "meshes"), [(tied, MESHES), (untied, MESHES[2::2]), (mixed, MESHES[:4:3])])
def test_every_mesh_reads_and_writes_the_same_bits(make, meshes, tmp_path):
    """Loading and saving again changes no bit at any mesh, so no bit changes between any two of them."""
    trained = engine_for(make([0, 2, 4, 9]), 3, 1)
    trained.train_batch(stream(batches(1)))
    path = trained.save_checkpoint(tmp_path, "base")
    base, layers = arrays_of(tmp_path / "base"), jax.device_get(trained.to_layers())
    assert path == str(tmp_path / "base")
    assert (
        any("opt_state" in name for name in base) and np.abs(base["layer_001/opt_state/0:mu/" + _some(layers[1])]).max()
    )
    for stages, data, partition in meshes:
        what = f"{stages} x {data}, {partition}"
        engine = engine_for(make(partition), stages, data, key=jax.random.key(99))
        assert engine.load_checkpoint(tmp_path, "base") == (path, {})
        assert_close(engine.to_layers(), layers, 0, what)
        assert (engine.global_steps, engine.train_calls, engine.micro_batches_seen) == (1, 1, M)
        assert str(jax.random.key_data(engine.state.key)) == str(jax.random.key_data(trained.state.key))
        engine.save_checkpoint(tmp_path, "again")
        assert_identical(arrays_of(tmp_path / "again"), base, what)
        for index, layer in enumerate(layers):
            if make is not mixed or index == 1:  # one layer alone, without an engine
                assert_close(jaxpipe.load_layer(tmp_path, "again", index), layer, 0, f"{what}, layer {index}")


def _some(layer):
    path = jax.tree_util.tree_flatten_with_path(layer)[0][-1][0]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def test_training_goes_on_as_if_uninterrupted(tmp_path, no_compiles):
    """The same mesh: bit-equal. Another one, with another schedule and remat mode: to 1e-6. Dropout on."""
    loss = masked_cross_entropy
    first = engine_for(tied(loss=loss), 2, 2)
    data = stream(batches(5))
    for _ in range(2):
        first.train_batch(data)
    first.save_checkpoint(tmp_path, client_state={"epoch": 3, "best": [0.5, None]})
    wanted = [float(first.train_batch(data)) for _ in range(3)]

    others = [
        (2, "uniform", {}),
        (3, [0, 1, 2, 9], {"schedule": "eager_1f1b", "remat": "none"}),
        (4, "uniform", {"schedule": "gpipe", "remat": "stage"}),
    ]
    for stages, partition, config in others:
        engine = engine_for(tied(partition, loss=loss), stages, 2, key=jax.random.key(7), **config)
        engine.train_batch(stream(batches(1, first=9)))
        path, client_state = engine.load_checkpoint(tmp_path)
        assert path == str(tmp_path / "global_step2") and client_state == {"epoch": 3, "best": [0.5, None]}
        rest = stream(batches(5))
        for _ in range(engine.micro_batches_seen):
            next(rest)
        with no_compiles():
            found = [engine.train_batch(rest) for _ in range(3)]
        found = [float(value) for value in found]
        if stages == 2:
            assert found == wanted
            assert_close(engine.state.params, jax.device_get(first.state.params), 0)
            assert_close(engine.state.opt_state, jax.device_get(first.state.opt_state), 0)
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_layers_hold_what_one_layer_alone_would_have(tmp_path):
    """Names and shapes on disk know nothing of stacks and stages; only layers with weights have an item."""
    engine = engine_for(untied(), 4, 1)
    engine.save_checkpoint(tmp_path)
    found = {name: array.shape for name, array in arrays_of(tmp_path / "global_step0").items()}
    layer = {name: shape for name, shape in found.items() if name.startswith("layer_003/")}
    assert layer == {
        f"layer_003/{lead}/{name}": shape
        for lead in ("params", "opt_state/0:mu", "opt_state/0:nu")
        for name, shape in {"up/kernel": (8, 16), "up/bias": (16,), "down/kernel": (16, 8), "down/bias": (8,)}.items()
    }
    assert {name.split("/")[0] for name in found} == {*(f"layer_00{i}" for i in (0, 1, 3, 4, 5, 6, 7, 8)), "state"}
    assert {name for name in found if name.startswith("state/")} == {
        "state/step",
        "state/key",
        "state/opt_state/0:count",
    }
    manifest = json.loads((tmp_path / "global_step0" / "checkpoint.json").read_text())
    assert manifest["partition"] == list(engine.partition) and manifest["mesh"] == {"pipe": 4, "data": 1}
    assert manifest["config"]["schedule"] == "1f1b" and manifest["versions"]["jax"] == jax.__version__
    assert [layer["name"] for layer in manifest["layers"]][:3] == ["Embedding", "Block", "tanh"]


def test_old_keys_and_short_floats(tmp_path):
    """An untyped key; bfloat16 weights; params that are a tuple, and one bare array."""

    def pair(key, x):
        return (jax.random.normal(key, (8, 8), jnp.bfloat16), {"b": jnp.zeros((8,), jnp.bfloat16)})

    layers = [
        jaxpipe.Layer(lambda key, x: jax.random.normal(key, (11, 8), jnp.bfloat16), lambda table, ids: table[ids]),
        *[jaxpipe.Layer(pair, lambda p, x: jnp.tanh(x @ p[0] + jnp.broadcast_to(p[1]["b"], x.shape)), "Pair")] * 3,
    ]
    module = jaxpipe.PipelineModule(layers, lambda y, t: y.astype(jnp.float32).mean() ** 2)
    first = engine_for(module, 2, 1, optax.sgd(0.1, momentum=0.9), key=jax.random.PRNGKey(3))
    first.train_batch(stream(batches(1)))
    first.save_checkpoint(tmp_path)
    second = engine_for(module, 1, 1, optax.sgd(0.1, momentum=0.9), key=jax.random.PRNGKey(4))
    second.load_checkpoint(tmp_path)
    assert_close(second.to_layers(), jax.device_get(first.to_layers()), 0)
    assert (np.asarray(second.state.key) == np.asarray(first.state.key)).all()
    assert second.to_layers()[1][0].dtype == jnp.bfloat16


def test_keys_with_dots_and_slashes(tmp_path):
    """Orbax joins names by dots: none may stand for another."""

    def init(key, x):
        names = ("a", "a.b", "c/d", "e:f%2E")
        params = {name: jax.random.normal(jax.random.fold_in(key, i), (8,)) for i, name in enumerate(names)}
        return {**params, "a": {"b": 7 * jnp.ones(8)}, "c": {"d": 9 * jnp.ones(8)}}

    def apply(params, x):
        return x * sum(jax.tree.leaves(params)).reshape(1, 1, 8)

    layers = [tied().layers[0].entry, *[jaxpipe.Layer(init, apply, "Odd")] * 3, tied().layers[-1].entry]
    module = jaxpipe.PipelineModule(layers, tied().loss_fn)
    first, second = engine_for(module, 2, 1), engine_for(module, 1, 1, key=jax.random.key(9))
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    wanted = jax.device_get(first.to_layers())
    assert_close(second.to_layers(), wanted, 0)
    assert_close(jaxpipe.load_layer(tmp_path, None, 2), wanted[2], 0)
