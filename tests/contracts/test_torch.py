"""The same model written in torch: an oracle that shares not even JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from tests.compare import assert_close

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WIDTH, HEADS, VOCAB, LENGTH, ROWS, M = 16, 2, 13, 6, 4, 3
EPSILON = 1e-5


def block_init(key, x):
    keys = iter(jax.random.split(key, 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) / shape[0] ** 0.5

    return {
        "norm1": {"scale": 1 + 0.1 * normal(WIDTH), "bias": 0.1 * normal(WIDTH)},
        "qkv": normal(WIDTH, 3 * WIDTH),
        "out": normal(WIDTH, WIDTH),
        "norm2": {"scale": 1 + 0.1 * normal(WIDTH), "bias": 0.1 * normal(WIDTH)},
        "up": normal(WIDTH, 4 * WIDTH),
        "down": normal(4 * WIDTH, WIDTH),
    }


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * jnp.broadcast_to(p["scale"], x.shape) + jnp.broadcast_to(p["bias"], x.shape)


def block(p, x):
    h = norm(p["norm1"], x)
    q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(h @ p["qkv"], 3, -1))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + attended @ p["out"]
    return x + jax.nn.gelu(norm(p["norm2"], x) @ p["up"], approximate=True) @ p["down"]


def embedding():
    return jaxpipe.Layer(
        lambda key, x: {"table": jax.random.normal(key, (VOCAB, WIDTH))}, lambda p, ids: p["table"][ids], "Embedding"
    )


def loss_fn(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def module():
    return jaxpipe.PipelineModule(
        [
            jaxpipe.TiedLayerSpec("table", embedding),
            *[jaxpipe.Layer(block_init, block, "Block") for _ in range(4)],
            jaxpipe.TiedLayerSpec("table", embedding, forward_fn=lambda p, x: x @ p["table"].T),
        ],
        loss_fn,
    )


def torch_loss(layers, ids, labels):
    functional = torch.nn.functional

    def normed(p, x):
        return functional.layer_norm(x, (WIDTH,), p["scale"], p["bias"], EPSILON)

    x = layers[0]["table"][ids]
    for p in layers[1:5]:
        qkv = (normed(p["norm1"], x) @ p["qkv"]).chunk(3, -1)
        q, k, v = (part.reshape(ROWS, LENGTH, HEADS, -1).transpose(1, 2) for part in qkv)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.transpose(1, 2).reshape(ROWS, LENGTH, WIDTH) @ p["out"]
        x = x + functional.gelu(normed(p["norm2"], x) @ p["up"], approximate="tanh") @ p["down"]
    logits = x @ layers[0]["table"].T
    return functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))


def test_loss_gradients_and_five_adam_steps():
    engine = jaxpipe.initialize(
        module(),
        optax.adam(1e-3, eps=1e-8),
        mesh=jaxpipe.make_mesh(pipe=3, data=2),
        example=(np.zeros((ROWS, LENGTH), int),) * 2,
        config={"num_micro_batches": M},
    )
    rng = np.random.default_rng(0)
    batches = [tuple(rng.integers(0, VOCAB, (M, ROWS, LENGTH)) for _ in range(2)) for _ in range(5)]
    layers = jax.tree.map(lambda a: torch.tensor(np.asarray(a), requires_grad=True), engine.to_layers())
    adam = torch.optim.Adam(jax.tree.leaves(layers), lr=1e-3, eps=1e-8)

    def to_numpy(tree):
        return jax.tree.map(lambda t: t.detach().numpy(), tree)

    for step, (ids, labels) in enumerate(batches):
        adam.zero_grad()
        losses = [torch_loss(layers, torch.tensor(i), torch.tensor(t)) for i, t in zip(ids, labels, strict=True)]
        wanted = sum(losses) / M
        wanted.backward()
        if step == 0:
            loss, grads = engine.pipe.value_and_grad(engine.state.params, (ids, labels))
            assert_close(loss, wanted.detach().numpy(), 5e-6, "loss")
            assert_close(engine.pipe.to_layers(grads), jax.tree.map(lambda t: t.grad.numpy(), layers), 5e-6, "gradient")
        adam.step()
        found = engine.train_batch(iter(zip(ids, labels, strict=True)))
        assert_close(found, wanted.detach().numpy(), 2e-5, f"loss of step {step}")
    assert_close(engine.to_layers(), to_numpy(layers), 2e-5, "weights after five steps")
