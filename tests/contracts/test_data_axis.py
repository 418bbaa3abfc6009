"""Layers and losses may use the axis "data": collectives over it have the transposes of a mean over ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import LayerError, LossError
from tests.compare import assert_close

M, ROWS, WIDTH, DATA = 2, 4, 4, 2


def dense(function, name):
    def init(key, x):
        return {"w": jax.random.normal(key, (WIDTH, WIDTH)) / 2}

    return jaxpipe.Layer(init, lambda p, x: function(x @ p["w"]), name)


def gathered(x):
    """Attention over the rows of all data ranks."""
    every = jax.lax.all_gather(x, "data", tiled=True)
    return x + jax.nn.softmax(x @ every.T) @ every


def centred(x):
    mean = jax.lax.pmean(x.mean(0), "data")
    return x - jnp.broadcast_to(mean, x.shape) * 0.5


def summed(x):
    return jnp.tanh(x) * jnp.broadcast_to(1 + jax.lax.psum((x**2).mean(0), "data"), x.shape)


def by_rank(x):
    return x * (1 + jax.lax.axis_index("data").astype(x.dtype))


def rank_loss(y, t):
    """Not a mean of rows: compares with the mean over all ranks."""
    return ((y - t) ** 2).mean() + (jax.lax.pmean(y, "data") ** 2).mean()


LAYERS = [
    dense(gathered, "Gathered"),
    dense(centred, "Centred"),
    dense(summed, "Summed"),
    dense(by_rank, "ByRank"),
]


def oracle(weights, batch):
    """All ranks as one vmap, whose collectives JAX differentiates by itself; the objective is the mean over ranks."""

    def rank(weights, x, t):
        for layer, w in zip(LAYERS, weights, strict=True):
            x = layer.apply({"w": w}, x)
        return rank_loss(x, t)

    def whole(weights):
        total = 0.0
        for x, t in zip(*batch, strict=True):
            parts = [a.reshape(DATA, ROWS // DATA, WIDTH) for a in (x, t)]
            total += jax.vmap(rank, in_axes=(None, 0, 0), axis_name="data")(weights, *parts).mean()
        return total / M

    return jax.value_and_grad(whole)(weights)


@pytest.mark.parametrize("partition", ["uniform", "cost", [0, 1, 4]])
def test_gradients_with_collectives_over_data(partition):
    module = jaxpipe.PipelineModule(LAYERS, rank_loss, partition)
    remat = {"uniform": "layer", "cost": "none"}.get(str(partition), "stage")
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=DATA), M, remat=remat)
    rng = np.random.default_rng(0)
    batch = tuple(rng.normal(size=(M, ROWS, WIDTH)).astype(np.float32) for _ in range(2))
    pipe.check(tuple(a[0] for a in batch))
    params = pipe.init(1, batch[0][0])
    weights = [layer["w"] for layer in jax.device_get(pipe.to_layers(params))]
    wanted, wanted_grads = oracle(weights, batch)
    found, grads = pipe.value_and_grad(params, batch)
    assert_close((found, [g["w"] for g in pipe.to_layers(grads)]), (wanted, wanted_grads), 2e-6)
    assert_close(pipe.evaluate(params, batch), wanted, 1e-6)


def test_shapes_without_a_mesh():
    module = jaxpipe.PipelineModule([*LAYERS, lambda x: jax.lax.all_gather(x, "data", tiled=True)], rank_loss)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32)
    assert module.shapes(x)[-1].outputs.shape == (ROWS, WIDTH)
    assert module.shapes(x, mesh=jaxpipe.make_mesh(pipe=1, data=DATA))[-1].outputs.shape == (DATA * ROWS, WIDTH)
    module.partition_method = "cost"
    assert module.partition(2, x)[-1] == 5


def test_a_permute_is_refused():
    """It would never end: the ranks of a pipeline run different layers at one time."""

    def shifted(x):
        return x + jax.jit(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]))(x)

    module = jaxpipe.PipelineModule([*LAYERS, shifted], rank_loss)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32)
    with pytest.raises(LayerError, match=r"layer 4 \(shifted\) uses jax.lax.ppermute.*all_gather"):
        jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=DATA), M).check((x, x))
    jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=1, data=DATA), M).check((x, x))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("where", ["layer", "loss", "metrics"])
def test_the_pipe_axis_is_refused(stages, where):
    """At two ranks it would hang; at one, the result would not be that of two."""

    def named(x):
        return jax.lax.pmean(x, ("pipe", "data"))

    def loss(y, t):
        value = ((y - t) ** 2).mean()
        if where == "metrics":
            return value, {"all": named(value)}
        return named(value) if where == "loss" else value

    scale = jaxpipe.Layer(lambda key, x: {"w": jnp.ones(8)}, lambda p, x: x * p["w"][None], "Scale")
    layers = [scale, jax.jit(named) if where == "layer" else jnp.tanh]
    pipe = jaxpipe.Pipeline(jaxpipe.PipelineModule(layers, loss, "uniform"), jaxpipe.make_mesh(pipe=stages), 2)
    batch = (np.ones((2, 4, 8), np.float32),) * 2
    with pytest.raises((LayerError, LossError), match='names the mesh axis "pipe"'):
        pipe.evaluate(pipe.init(0, batch[0][0]), batch, return_metrics=True)
