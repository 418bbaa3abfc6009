"""Whatever a layer returns travels between stages: NumPy arrays and scalars, Python scalars, PRNG keys, short floats."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import LayerError
from tests.compare import assert_close

M, WIDTH = 2, 4
DOTS = jax.checkpoint_policies.dots_saveable


def init(key, x):
    return {"w": jax.random.normal(key, (WIDTH, WIDTH), jnp.float32) / 2}


DENSE = jaxpipe.Layer(init, lambda p, x: jnp.tanh(x @ p["w"]), "Dense")


def make(x):
    """Everything that NumPy and Python have and a device has not, and things that are easily dropped."""
    return {
        "x": x,
        "positions": np.arange(WIDTH),
        "mask": np.tril(np.ones((WIDTH, WIDTH))),
        "numpy": (np.float64(1.5), np.int64(3), np.bool_(True)),
        "python": [2.0, 3, True, 1 + 2j],
        "keys": (jax.random.key(3), jax.random.split(jax.random.key(1), 3), jax.random.key(5, impl="rbg")),
        "short": (jnp.bfloat16(0.5), np.float16(3), np.uint8(7)),
        "empty": np.ones((0, 3)),
        "none": None,
        "gradient of an integer": np.zeros((2,), jax.dtypes.float0),
    }


def change(t):
    return {**t, "x": t["x"] * 2.0, "python": [t["python"][0] * 0.5, *t["python"][1:]]}


def use(t):
    def wide(a):
        return jnp.asarray(a).astype(jnp.float32)

    x = t["x"] * jnp.broadcast_to(wide(t["positions"]), t["x"].shape) + jnp.broadcast_to(
        wide(t["mask"]).sum(0), t["x"].shape
    )
    x = x * wide(t["numpy"][0]) + wide(t["numpy"][1]) * wide(t["numpy"][2])
    x = x * wide(t["python"][0]) + wide(t["python"][1]) * wide(t["python"][2]) + wide(jnp.imag(t["python"][3]))
    one, three, rbg = t["keys"]
    x = x * (1 + jax.random.uniform(one, x.shape, x.dtype)) + jax.random.normal(three[1], x.shape, x.dtype)
    x = x + jax.random.uniform(rbg, x.shape, x.dtype)
    x = x * wide(t["short"][0]) + wide(t["short"][1]) + wide(t["short"][2])
    return x * 0.1 + wide(t["empty"]).sum()


LAYERS = [DENSE, make, change, change, change, use, DENSE]


def loss(y, t):
    return ((y - t) ** 2).mean()


def by_hand(layers, batch):
    """The same model as one plain function, which knows nothing of stages or canonical values."""

    def one(weights, x, t):
        y = use(change(change(change(make(jnp.tanh(x @ weights[0]))))))
        return loss(jnp.tanh(y @ weights[1]), t)

    def whole(weights):
        return sum(one(weights, x, t) for x, t in zip(*batch, strict=True)) / M

    return jax.value_and_grad(whole)([layers[0]["w"], layers[6]["w"]])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(M, 4, WIDTH)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(
    ("boundaries", "remat"),
    [([0, 7], DOTS), ([0, 3, 7], "layer"), ([0, 1, 2, 7], "none"), ([0, 2, 4, 5, 7], DOTS), ([0, 3, 7], 2)],
    ids=["one stage", "like boundaries", "unlike", "in the middle", "interval"],
)
def test_what_layers_return_travels(batch, boundaries, remat):
    module = jaxpipe.PipelineModule(LAYERS, loss, boundaries)
    mesh = jaxpipe.make_mesh(pipe=len(boundaries) - 1)
    pipe = jaxpipe.Pipeline(module, mesh, M, remat=remat, poison=True)
    params = pipe.init(7, batch[0][0])
    found, grads = pipe.value_and_grad(params, batch)
    layers = jax.device_get(pipe.to_layers(params))
    wanted, wanted_grads = by_hand(layers, batch)
    grads = pipe.to_layers(grads)
    assert_close((found, grads[0]["w"], grads[6]["w"]), (wanted, *wanted_grads), 2e-6)
    assert_close(pipe.evaluate(params, batch), wanted, 1e-6)


def test_values_of_64_bits_stay_so_where_they_are_enabled(batch):
    with jax.enable_x64(True):
        shapes = jaxpipe.PipelineModule(LAYERS).shapes(batch[0][0])[1].outputs
        assert shapes["mask"].dtype == np.float64 and shapes["python"][1].dtype == np.int64
        test_what_layers_return_travels(batch, [0, 1, 2, 7], "layer")


def test_as_outputs_of_the_last_layer_and_inputs_of_the_first(batch):
    """Keys as data: each row has its own."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))
    layers = [lambda keys: (noise(keys), keys), lambda t: (t[0] * 2.0, t[1]), lambda t: (*t, 3, np.arange(4))]
    module = jaxpipe.PipelineModule(layers, lambda y, t: (y[0] ** 2).mean() * y[2].astype(jnp.float32), [0, 1, 3])
    keys = jax.random.split(jax.random.key(0), (M, 4))
    engine = jaxpipe.initialize(
        module,
        optax.sgd(0.1),
        mesh=jaxpipe.make_mesh(pipe=2, data=2),
        example=(keys[0], None),
        config={"num_micro_batches": M},
        key=3,
    )
    wanted = np.mean([3 * (2 * noise(keys[m])) ** 2 for m in range(M)], dtype=np.float32)
    assert_close(engine.train_batch(iter([(k, None) for k in keys])), wanted, 1e-6)
    module = jaxpipe.PipelineModule(layers[:2], lambda y, t: (y[0] ** 2).mean(), [0, 1, 2])
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=2), M)
    params = pipe.init(0, keys[0])
    _, (_, back) = pipe.evaluate(params, (keys, None), return_logits=True)
    assert (jax.random.key_data(back) == jax.random.key_data(keys)).all()


def test_a_scalar_is_strong_and_compiles_once(batch, no_compiles):
    """A scan over like layers that turn a Python number into another one, and a second step."""

    def step(t):
        return (t[0] + 0.0, 2.0, True)

    layers = [DENSE, lambda x: (x, 1, True), step, step, step, lambda t: t[0] * t[1]]
    layers[1] = lambda x: (x, 1.0, False)
    pipe = jaxpipe.Pipeline(jaxpipe.PipelineModule(layers, loss, [0, 6]), jaxpipe.make_mesh(pipe=1), M)
    params = pipe.init(0, batch[0][0])
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))
    first = pipe.value_and_grad(params, batch)
    with no_compiles():
        second = pipe.value_and_grad(params, batch)
    assert_close(first, second, 0)
    weights = jax.device_get(pipe.to_layers(params))[0]["w"]
    assert_close(first[0], np.mean((2 * np.tanh(batch[0] @ weights) - batch[1]) ** 2, dtype=np.float32), 1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", r"layer 1 \(make\) returned 'text' of type str, as the entry \['v'\]\['w'\]"),
        (object(), "of type object"),
        (np.datetime64("2020-01-01"), "of type datetime64"),
        (2**70, "of type int.*too large"),
        (jax.ShapeDtypeStruct((2,), np.float32), "of type ShapeDtypeStruct"),
    ],
    ids=["str", "object", "date", "huge", "aval"],
)
def test_what_is_no_number_is_refused(batch, value, message):
    def make(x):
        return {"v": {"w": value}, "x": x}

    module = jaxpipe.PipelineModule([DENSE, make, lambda t: t["x"]], loss, [0, 3])
    with pytest.raises(LayerError, match=message):
        module.shapes(batch[0][0])
