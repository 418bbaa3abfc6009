"""Optimizers, checkpoints and files of weights of a model that is cut over a further axis: as without the axis."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from tests.checkpoint.on_disk import arrays_of, assert_identical
from tests.compare import assert_close

WIDTH, ROWS, M, STEPS = 8, 4, 2, 2


def init(key, x):
    one, two = jax.random.split(key)
    return {
        "up": jax.random.normal(one, (WIDTH, 2 * WIDTH)) / 3,
        "bias": 0.1 * jax.random.normal(two, (2 * WIDTH,)),
        "down": jax.random.normal(two, (2 * WIDTH, WIDTH)) / 3,
        "scale": jax.numpy.full((WIDTH,), 1.1),
    }


def block(p, x):
    return x * p["scale"][None] + jax.numpy.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]


LAYERS = [
    jaxpipe.Layer(lambda k, x: {"table": jax.random.normal(k, (12, WIDTH))}, lambda p, x: p["table"][x], "Embed"),
    *[jaxpipe.Layer(init, block, "Block") for _ in range(3)],
    jaxpipe.Layer(lambda k, x: {"head": jax.random.normal(k, (WIDTH, 12)) / 3}, lambda p, x: x @ p["head"], "Head"),
]
RULES = [("up|head", P(None, "model")), ("bias|down|table", P("model"))]


def loss_fn(y, t):
    return optax.softmax_cross_entropy_with_integer_labels(y, t).mean()


MODULE = jaxpipe.PipelineModule(LAYERS, loss_fn, sharding=RULES)


EXAMPLE = (np.zeros(ROWS, np.int32),) * 2


def engine_for(name, key=3, zero_stage=0, layers=None, **axes):
    return jaxpipe.initialize(
        MODULE,
        OPTIMIZERS[name](),
        mesh=jaxpipe.make_mesh(**axes),
        example=EXAMPLE,
        config={"num_micro_batches": M, "gradient_clipping": 0.3, "zero_stage": zero_stage},
        key=key,
        layers=layers,
    )


def stream(steps, first=0):
    for step in range(first, first + steps):
        rng = np.random.default_rng(step)
        for _ in range(M):
            yield tuple(rng.integers(0, 12, (2, ROWS)).astype(np.int32))


def decayed(params):
    return jax.tree.map(lambda a: a.ndim > 1, params)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=decayed),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(1e-2),
}


def after_training(name, zero_stage=0, **axes):
    engine, data = engine_for(name, zero_stage=zero_stage, **axes), stream(STEPS)
    for _ in range(STEPS):
        engine.train_batch(data)
    return engine


def gradients(layers, step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), layers)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_do_what_optax_does_on_one_device(name):
    """With clipping by the norm over everything."""
    tx = optax.chain(optax.clip_by_global_norm(0.3), OPTIMIZERS[name]())
    pipe = jaxpipe.Pipeline(MODULE, jaxpipe.make_mesh(pipe=2, data=2, model=2), M)
    pipe.check(EXAMPLE)
    layers = gradients([shapes.params for shapes in MODULE.shapes(EXAMPLE[0])], step=0)
    natural = {f"layer_{index:03d}": layer for index, layer in enumerate(layers)}
    params, mine = pipe.from_layers(layers), pipe.optimizer(tx)
    state, update = mine.init(params), jax.jit(mine.update)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        plain, plain_update = tx.init(natural), jax.jit(tx.update)
        for step in (1, 2):
            grads = gradients(layers, step)
            updates, state = update(pipe.from_layers(grads), state, params)
            wanted, plain = plain_update(dict(zip(natural, grads, strict=True)), plain, natural)
            assert_close(pipe.to_layers(updates), list(wanted.values()), 1e-4 if name == "muon" else 1e-5, f"{step}: ")
    assert jax.tree.map(lambda a: a.sharding, updates) == jax.tree.map(lambda a: a.sharding, params)


def test_the_state_of_an_optimizer_is_cut_like_its_params():
    engine = engine_for("adam", pipe=2, model=2)
    held = engine.state.opt_state
    stack = {name: (a.shape, a.sharding.spec) for name, a in held.stacked["Block"].items()}
    assert sorted(stack.values(), key=str) == sorted(
        2 * [((2, 2, 16), P("pipe", None, "model")), ((2, 2, 8), P("pipe"))]
        + 2 * [((2, 2, 8, 16), P("pipe", None, None, "model")), ((2, 2, 16, 8), P("pipe", None, "model"))],
        key=str,
    )
    moments = {name: a.sharding.spec for name, a in held.rest.items() if a.ndim}
    assert sorted(moments.values(), key=str) == 2 * [P("model", "pipe")] + 2 * [P("pipe", "model")]


def test_a_checkpoint_moves_between_sizes_of_the_axis_bit_for_bit(tmp_path):
    trained = after_training("adamw", pipe=2, data=2, model=2)
    trained.save_checkpoint(tmp_path, "base")
    base, layers = arrays_of(tmp_path / "base"), jax.device_get(trained.to_layers())
    assert base["layer_002/params/up"].shape == (WIDTH, 2 * WIDTH) and np.abs(base["layer_002/opt_state/0:mu/up"]).max()
    for axes in ({"pipe": 2, "data": 2, "model": 1}, {"pipe": 1, "model": 4}):
        engine = engine_for("adamw", key=9, **axes)
        engine.load_checkpoint(tmp_path, "base")
        assert_close(engine.to_layers(), layers, 0, str(axes))
        engine.save_checkpoint(tmp_path, "again")
        assert_identical(arrays_of(tmp_path / "again"), base, str(axes))
        assert_close(jaxpipe.load_layer(tmp_path, "again", 2), layers[2], 0)
    wanted = trained.train_batch(stream(1, first=STEPS))
    assert_close(engine.train_batch(stream(1, first=STEPS)), wanted, 1e-6)


def test_files_of_weights_have_the_shapes_of_the_layers(tmp_path):
    engine, path = engine_for("adam", pipe=2, model=2), tmp_path / "weights.safetensors"
    jaxpipe.save_weights(path, engine)
    read = jaxpipe.load_weights(path)
    assert [jax.tree.map(np.shape, layer) for layer in read[1:3]] == 2 * [
        {"up": (8, 16), "bias": (16,), "down": (16, 8), "scale": (8,)}
    ]
    other = engine_for("adam", layers=read, pipe=1, model=4)
    assert other.state.params["stacked"]["Block"]["up"].sharding.spec[2:] == (None, "model")
    assert_close(other.to_layers(), jax.device_get(engine.to_layers()), 0)


def test_with_the_state_cut_over_the_data_ranks_as_well(tmp_path):
    cut = after_training("adamw", zero_stage=1, pipe=2, data=2, model=2)
    whole = after_training("adamw", pipe=2, data=2, model=1)
    assert_close(cut.to_layers(), jax.device_get(whole.to_layers()), 1e-5)
    for stack in (cut.state.params["stacked"]["Block"], cut.state.opt_state.stacked["Block"]):
        assert all(
            len(a.addressable_shards[0].data.ravel()) * 8 <= a.size * (1 + ("scale" in n)) for n, a in stack.items()
        )
    cut.save_checkpoint(tmp_path)
    whole.load_checkpoint(tmp_path)
    assert_close(whole.to_layers(), jax.device_get(cut.to_layers()), 0)
