"""A flax nnx model as people write them, trained in a pipeline: built first, then cut into layers in five lines.

Run it with `python examples/built_model.py`; it takes about half a minute on simulated devices. The model, an encoder with
a loop over its blocks, learns to turn sequences of digits round. At the end its modules come back, and compute what they
computed in the pipeline.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
import optax
from flax import nnx
from pictures import draw_progress

import jaxpipe

DIGITS, LENGTH, WIDTH, HEADS, ROWS = 10, 8, 32, 4, 64


class Embedding(nnx.Module):
    """Digits to vectors with their places, and vectors back to logits of digits."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.digits = nnx.Embed(DIGITS, WIDTH, rngs=rngs)
        self.places = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L] -> [B, L, D]."""
        return self.digits(x) + self.places[...]

    def attend(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, DIGITS]."""
        return self.digits.attend(x)


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm_2(x)))))


class Transformer(nnx.Module):
    """The model as it was before anybody thought of a pipeline."""

    def __init__(self, num_blocks: int, *, rngs: nnx.Rngs):
        self.embed = Embedding(rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def loss_fn(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Nats per digit, and the part of the digits that are right."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return each.mean(), {"right": (logits.argmax(-1) == labels).mean()}


def sequences(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Micro-batches of digits [B, L], and the same from the last to the first."""
    rng = np.random.default_rng(seed)
    while True:
        x = rng.integers(0, DIGITS, (ROWS, LENGTH), dtype=np.int32)
        yield x, x[:, ::-1].copy()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--output", type=Path, default=Path("demo_out"))
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_num_cpu_devices", args.stages)
    mesh = jaxpipe.make_mesh(pipe=args.stages, devices=jax.devices("cpu")[: args.stages])

    model = Transformer(args.blocks, rngs=nnx.Rngs(0))
    module = jaxpipe.PipelineModule([model.embed, *model.blocks, model.norm, model.embed.attend], loss_fn)

    train, rate = sequences(seed=1), optax.warmup_cosine_decay_schedule(0, 4e-3, args.steps // 10 + 1, args.steps + 2)
    settings = {"num_micro_batches": 4, "remat": "none"}
    engine = jaxpipe.initialize(module, optax.adam(rate), mesh=mesh, example=next(train), config=settings)
    print(engine.summary(), end="\n\n")
    test: list[Any] = [batch for batch, _ in zip(sequences(seed=2), range(8), strict=False)]
    losses, points = [], [(0, 100 * engine.evaluate(test)["right"])]
    for step in range(1, args.steps + 1):
        losses.append(engine.train_batch(train))
        if step % max(1, args.steps // 8) == 0:
            found = engine.evaluate(test)
            points.append((step, 100 * found["right"]))
            print(f"step {step:4d}: test loss {found['loss']:.3f}, {points[-1][1]:.1f} % of the digits are right")

    trained = engine.modules()  # new modules; those of `model` are what they were
    model.embed, model.blocks, model.norm = trained[0], nnx.List(trained[1:-2]), trained[-2]
    model.eval()
    digits, _ = test[0]
    alone = model(digits)
    piped = engine.eval_batch(iter([(digits, None)]), return_logits=True, compute_loss=False, num_micro_batches=1)[0]
    print(
        f"the model outside of the pipeline differs by {np.abs(np.asarray(alone) - np.asarray(piped)).max():.1e} at most"
    )
    print(f"accuracy: {points[-1][1]:.1f} %; {digits[0]} -> {np.asarray(alone)[0].argmax(-1)}")
    picture = args.output / "built_model.png"
    draw_progress(
        picture,
        [float(loss) for loss in losses],
        points,
        title="A model that was built first learns to turn digits round",
        loss="loss, nats per digit",
        right="right digits, %",
        label="digits that are right",
    )
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
