"""The oracle against derivatives that are written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.executor.reference import forward, value_and_grad
from jaxpipe.model import keys
from tests.compare import assert_close

M, ROWS, WIDTH = 2, 4, 3
rng = np.random.default_rng(0)
BATCH = tuple(rng.normal(size=(M, ROWS, WIDTH)).astype(np.float32) for _ in range(2))
W = [rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for _ in range(2)]


def linear(p, x):
    return x @ p["w"] * p["n"].astype(x.dtype)


LINEAR = jaxpipe.Layer(lambda key, x: {}, linear, "Linear")
LAYERS = [{"w": W[0], "n": np.int32(1)}, {"w": W[1], "n": np.int32(2)}]


def test_a_linear_model_in_numpy():
    module = jaxpipe.PipelineModule([LINEAR, LINEAR], lambda y, t: ((y - t) ** 2).mean())
    found, grads = value_and_grad(module, LAYERS, BATCH)
    x, t = (a.reshape(-1, WIDTH).astype(np.float64) for a in BATCH)
    a, b = (w.astype(np.float64) for w in W)
    y = x @ a @ b * 2
    dy = 2 * (y - t) / y.size
    assert_close(found, np.float32(((y - t) ** 2).mean()), 1e-6)
    wanted = [{"w": (2 * x.T @ dy @ b.T), "n": 0}, {"w": 2 * (x @ a).T @ dy, "n": 0}]
    for gradient, right in zip(grads, wanted, strict=True):
        assert_close(gradient["w"], right["w"].astype(np.float32), 2e-6)
        assert gradient["n"].dtype == jnp.int32 and gradient["n"] == 0


def test_weights_of_the_loss_join_micro_batches_and_data_ranks():
    """Metrics beside the loss do not count; where nothing counts everything is zero."""

    def loss(y, t):
        on = (t[:, 0] > 0).astype(y.dtype)
        return jaxpipe.Weighted((((y - t) ** 2).mean(-1) * on).sum(), on.sum()), {"metric": y.max()}

    module = jaxpipe.PipelineModule([LINEAR], loss)
    for ranks in (1, 2):
        found, _ = value_and_grad(module, LAYERS[:1], BATCH, num_data_ranks=ranks)
        each = ((BATCH[0] @ W[0] - BATCH[1]) ** 2).mean(-1)
        on = BATCH[1][..., 0] > 0
        assert_close(found, each[on].mean(), 1e-6)
    found, grads = value_and_grad(module, LAYERS[:1], (BATCH[0], -np.abs(BATCH[1])))
    assert found == 0 and (grads[0]["w"] == 0).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ties_and_keys(ranks):
    """Each use of a tie has a key of its own; rows of different data ranks have different keys."""

    def noisy(p, x, *, key):
        return x @ p["w"] + (0 if key is None else jax.random.normal(key, x.shape))

    def make():
        return jaxpipe.Layer(lambda key, x: {}, noisy)

    use = jaxpipe.TiedLayerSpec("tie", make)
    module = jaxpipe.PipelineModule([use, jnp.tanh, use], lambda y, t: ((y - t) ** 2).mean())
    root, layers = jax.random.key(3), [{"w": W[0]}, {}, {}]

    def whole(w):
        total = 0.0
        for m in range(M):
            for rank in range(ranks):
                key = keys.micro_batch_key(root, m, rank)
                rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
                x = noisy({"w": w}, BATCH[0][m, rows], key=keys.layer_key(key, 0))
                x = noisy({"w": w}, jnp.tanh(x), key=keys.layer_key(key, 2))
                total += ((x - BATCH[1][m, rows]) ** 2).mean()
        return total / (M * ranks)

    found, grads = value_and_grad(module, layers, BATCH, root, num_data_ranks=ranks)
    wanted, gradient = jax.jit(jax.value_and_grad(whole))(W[0])
    assert_close((found, grads[0]["w"]), (wanted, gradient), 2e-6)
    x = np.tanh(BATCH[0][0] @ W[0]) @ W[0]
    assert_close(forward(module, layers, BATCH[0][0]), x, 1e-6)


@pytest.mark.parametrize("rule", [None, "layer_001/w"])
def test_casts_as_they_are_written_out_here(rule):
    """Short weights and inputs, short values between the layers, long outputs; gradients of the long weights."""

    def wide(p, x):
        return jnp.sin(x.astype(jnp.float32) @ p["w"].astype(jnp.float32)) * p["n"].astype(jnp.float32)

    layer = jaxpipe.Layer(lambda key, x: {}, wide)
    module = jaxpipe.PipelineModule([layer, layer], lambda y, t: ((y - t) ** 2).mean())

    def short(a):
        return a.astype(jnp.bfloat16)

    def once(w, x, n):
        return jnp.sin(short(x).astype(jnp.float32) @ w.astype(jnp.float32)) * n

    def whole(a, b):
        b = b if rule else short(b)
        outputs = [once(b, short(once(short(a), x, 1.0)), 2.0) for x in BATCH[0]]
        return sum(((y - t) ** 2).mean() for y, t in zip(outputs, BATCH[1], strict=True)) / M

    wanted, gradients = jax.jit(jax.value_and_grad(whole, (0, 1)))(*map(jnp.asarray, W))
    casts = {"compute_dtype": jnp.bfloat16, "float32_params": rule}
    found, grads = value_and_grad(module, LAYERS, BATCH, **casts)
    assert_close((found, [g["w"] for g in grads]), (wanted, list(gradients)), 2e-3)
    plain, _ = value_and_grad(module, LAYERS, BATCH)
    assert abs(float(found) - float(plain)) > 1e-5, "the casts make a difference"
    assert forward(module, LAYERS, BATCH[0][0], **casts).dtype == jnp.float32


def test_gradients_of_short_floats_are_added_in_long_ones():
    table = jaxpipe.Layer(lambda key, x: {}, lambda p, x: p["t"] * x.astype(jnp.bfloat16), "Table")
    module = jaxpipe.PipelineModule([table], lambda y, t: y.astype(jnp.float32).sum())
    many = np.ones((512, 1, 1), np.float32)  # 0.5 + 1 / 512 is 0.5 in bfloat16
    found, grads = value_and_grad(module, [{"t": jnp.ones((1, 1), jnp.bfloat16)}], (many, many))
    assert found == 1 and grads[0]["t"].dtype == jnp.bfloat16 and grads[0]["t"] == 1
