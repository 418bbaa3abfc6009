"""jaxpipe, and the loop that one would write for one device, as contestants."""

import functools
import os
from typing import Any

# XLA reads this once, so before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import task

import jaxpipe

# Saving all products costs the least here; the others of `Pipeline(remat=)` were slower on two cores.
REMAT = "dots"


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over [B, L]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def embed(params: Any, x: jax.Array) -> jax.Array:
    """[B, L] tokens -> [B, L, D]."""
    return params["tokens"][x] + params["places"]


def head(params: Any, x: jax.Array) -> jax.Array:
    """[B, L, D] -> [B, L, V] logits."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * params["scale"] @ params["kernel"]


def block_of(size: task.Task) -> Any:
    return functools.partial(model.apply_layer, model.Size(size.layers, size.width, size.heads, size.length, size.rows))


def pipeline(size: task.Task, stages: int) -> tuple[Any, Any]:
    """jaxpipe's engine, 1F1B."""
    weights = size.weights()

    def layer(apply: Any, params: dict[str, np.ndarray], name: str) -> jaxpipe.Layer:
        return jaxpipe.Layer(lambda key, x: jax.tree.map(jnp.asarray, params), apply, name)

    block = layer(block_of(size), weights[1], "block")
    layers = [layer(embed, weights[0], "embedding"), *[block] * size.layers, layer(head, weights[-1], "head")]
    inputs, labels = size.batch(0)
    engine = jaxpipe.initialize(
        jaxpipe.PipelineModule(layers, cross_entropy, partition_method="type:block"),
        optax.adam(task.LEARNING_RATE),
        mesh=jaxpipe.make_mesh(pipe=stages),
        example=(inputs[0], labels[0]),
        config={"num_micro_batches": task.MICRO_BATCHES, "remat": REMAT},
        layers=weights,
    )

    def train(number: int) -> float:
        loss = engine.train_batch(zip(*size.batch(number), strict=True))
        return float(jax.block_until_ready((loss, engine.state))[0])

    return train, lambda number: float(engine.eval_batch(zip(*size.batch(number), strict=True)))


def loop(size: task.Task) -> tuple[Any, Any]:
    """One device: a scan over micro-batches that adds up gradients, in it a scan over the stacked blocks."""
    first, *blocks, last = size.weights()
    params = jax.device_put((first, jax.tree.map(lambda *leaves: np.stack(leaves), *blocks), last))
    optimizer = optax.adam(task.LEARNING_RATE)
    state = optimizer.init(params)
    block = block_of(size)
    # prevent_cse=False: inside of a scan nothing can be merged across, and the barrier would cost.
    saving = jax.checkpoint(block, prevent_cse=False, policy=model.POLICY)

    def loss(apply: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, held: (apply(held, x), None), embed(params[0], x), params[1])[0]
        return cross_entropy(head(params[2], x), y)

    def step(params: Any, state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
        def body(carry: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss, 1)(saving, params, *batch)), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(body, start, (inputs, labels))
        mean, grads = jax.tree.map(lambda a: a / task.MICRO_BATCHES, total)
        updates, state = optimizer.update(grads, state, params)
        return mean, optax.apply_updates(params, updates), state

    def forward(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return jax.lax.map(lambda batch: loss(block, params, *batch), (inputs, labels)).mean()

    compiled, evaluated = jax.jit(step, donate_argnums=(0, 1)), jax.jit(forward)

    def train(number: int) -> float:
        nonlocal params, state
        found, params, state = compiled(params, state, *size.batch(number))
        return float(jax.block_until_ready((found, params, state))[0])

    return train, lambda number: float(evaluated(params, *size.batch(number)))


def main() -> None:
    stream, given = task.answers(), task.arguments()
    task.serve(stream, *(loop(given.task) if given.kind == "loop" else pipeline(given.task, given.stages)))


if __name__ == "__main__":
    main()
