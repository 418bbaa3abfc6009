"""Trains a small ResNet with batch normalization on scikit-learn's digits, in a pipeline of simulated devices, in seconds.

`python examples/resnet_digits.py --help` shows other sizes. It needs scikit-learn: pip install 'jaxpipe[examples]'.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

# XLA reads this once, so before JAX is imported. Where few cores simulate many devices, one may wait long for the
# others, and by default XLA takes a long wait for a deadlock.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import jaxpipe

Batch = tuple[np.ndarray, np.ndarray]


class Stem(nnx.Module):
    """Images [B, 8, 8] to features [B, 8, 8, width]."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(images[..., None])))


class Block(nnx.Module):
    """A residual block. With a stride of 2 the images become half as large, and the features as many as `width` says."""

    def __init__(self, before: int, width: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(before, width, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for _ in range(2)])
        self.shortcut = None if stride == 1 else nnx.Conv(before, width, (1, 1), strides=stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Head(nnx.Module):
    """Features to the logits of ten digits."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x.mean((1, 2)))


def loss_fn(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": (logits.argmax(-1) == labels).mean(dtype=jnp.float32)}


def make_resnet(width: int) -> jaxpipe.PipelineModule:
    """Eight layers; the shapes of their weights, and of what is handed on, change twice."""
    spec = jaxpipe.LayerSpec
    layers = [spec(Stem, width), spec(Block, width, width), spec(Block, width, width)]
    for wide in (2 * width, 4 * width):
        layers += [spec(Block, wide // 2, wide, 2), spec(Block, wide, wide)]
    return jaxpipe.PipelineModule([*layers, spec(Head, 4 * width)], loss_fn)


def read_digits(seed: int) -> tuple[Batch, Batch]:
    """Images [N, 8, 8] from 0 to 1 and labels [N], to train with and to test with: 1437 and 360."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images, labels = (digits.images[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def shuffled(data: Batch, rows: int, seed: int) -> Iterator[Batch]:
    """Micro-batches of so many rows for ever, in another order in every epoch, each image moved by up to one pixel."""
    images, labels = data
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(labels))
        for start in range(0, len(order) - rows + 1, rows):
            chosen = order[start : start + rows]
            padded = np.pad(images[chosen], ((0, 0), (1, 1), (1, 1)))
            down, right = generator.integers(0, 3, 2)
            yield padded[:, down : down + 8, right : right + 8], labels[chosen]


def in_order(data: Batch, rows: int) -> list[Batch]:
    """Micro-batches of all the data; the last one has the rows that are left."""
    images, labels = data
    return [(images[start : start + rows], labels[start : start + rows]) for start in range(0, len(labels), rows)]


def draw(path: Path, losses: list[float], accuracies: list[tuple[int, float]], test: Batch, found: np.ndarray) -> None:
    """The curves of the run, and the test images it is wrong about."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")  # no pyplot: it would pick a window system
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axes = left.add_subplot()
    axes.plot(np.arange(1, len(losses) + 1), losses, color="#8ecae6", linewidth=1.2, label="training loss")
    axes.set(xlabel="step", ylabel="loss", title="ResNet on digits")
    axes.set_ylim(0)
    axes.grid(alpha=0.25)
    other = axes.twinx()
    steps, values = zip(*accuracies, strict=True)
    other.plot(
        steps, [100 * value for value in values], color="#d1495b", marker="o", markersize=4, label="test accuracy"
    )
    other.set(ylabel="accuracy, %", ylim=(0, 102))
    other.annotate(
        f"{100 * values[-1]:.1f} %", (steps[-1], 100 * values[-1]), (-4, -16), textcoords="offset points", ha="right"
    )
    for each in (axes, other):
        each.spines["top"].set_visible(False)
    figure.legend(
        *(
            sum(both, [])
            for both in zip(axes.get_legend_handles_labels(), other.get_legend_handles_labels(), strict=True)
        ),
        loc="outside lower left",
        ncols=2,
        frameon=False,
    )
    images, labels = test
    wrong = np.flatnonzero(found != labels)
    right.suptitle(f"{len(wrong)} of {len(labels)} test images are read wrongly")
    grid = right.subplots(3, 4)
    for cell, at in zip(grid.flat, [*wrong[:12], *[None] * 12], strict=False):
        cell.axis("off")
        if at is not None:
            cell.imshow(images[at], cmap="gray_r")
            cell.set_title(f"{labels[at]} read as {found[at]}", fontsize=8)
    figure.savefig(path, dpi=150)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--stages", type=int, default=4, help="pipeline stages, each on its own devices")
    add("--data", type=int, default=2, help="data ranks: devices per stage, which share the rows of a micro-batch")
    add("--micro-batches", type=int, default=4, help="micro-batches per step")
    add("--rows", type=int, default=32, help="rows per micro-batch, over all data ranks")
    add("--width", type=int, default=8, help="features of the first blocks")
    add("--steps", type=int, default=150)
    add("--eval-every", type=int, default=25, help="steps between evaluations")
    add("--learning-rate", type=float, default=1e-2, help="at its peak")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("demo_out"), help="folder for the picture")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> float:
    """Returns the accuracy on the test images."""
    args = parse_arguments(arguments)
    jax.config.update("jax_num_cpu_devices", args.stages * args.data)  # simulated, unless there are others
    train, test = read_digits(args.seed)
    rate = optax.cosine_onecycle_schedule(args.steps, args.learning_rate)
    row = jax.ShapeDtypeStruct((args.rows, 8, 8), np.float32), jax.ShapeDtypeStruct((args.rows,), np.int32)
    engine = jaxpipe.initialize(
        make_resnet(args.width),
        optax.adamw(rate, weight_decay=1e-3),
        mesh=jaxpipe.make_mesh(pipe=args.stages, data=args.data),
        example=row,
        config={"num_micro_batches": args.micro_batches},
        key=args.seed,
    )
    print(engine.summary())
    batches, losses, accuracies = shuffled(train, args.rows, args.seed), [], []
    for step in range(1, args.steps + 1):
        losses.append(engine.train_batch(batches))
        if step % args.eval_every == 0 or step == args.steps:
            # With the running statistics, which an evaluation does not change.
            found = engine.evaluate(in_order(test, args.rows))
            accuracies.append((step, found["accuracy"]))
            print(f"step {step}: training loss {float(losses[-1]):.3f}, test accuracy {100 * found['accuracy']:.1f} %")
    logits = np.concatenate([jaxpipe.fetch(out).reshape(-1, 10) for out in engine.predict(in_order(test, args.rows))])
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "digits.png"
    draw(path, [float(loss) for loss in losses], accuracies, test, logits.argmax(-1))
    statistics = jax.tree.leaves(engine.layer_state())
    print(f"running statistics: {sum(leaf.size for leaf in statistics)} numbers, beside the weights")
    print(f"accuracy on {len(test[1])} test images: {100 * accuracies[-1][1]:.1f} %; see {path}")
    return accuracies[-1][1]


if __name__ == "__main__":
    main()
