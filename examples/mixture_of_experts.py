"""Trains a small mixture-of-experts language model: a pipeline of stages, each with its experts on two devices.

    python examples/mixture_of_experts.py                    # 4 stages x 2 devices for experts, simulated
    python examples/mixture_of_experts.py --coefficient 0    # without the balance loss, to see what it is for

Each block sends every byte to one of its experts. A router that is left alone sends nearly all bytes to a few of them, and
an expert takes only so many. So each block returns a balance loss beside its output, from whatever stage it is on, with
`jaxpipe.LayerOut`; it is a part of what is trained, and `engine.metrics` and `engine.evaluate` report it by name.
"""

import argparse
import os
from pathlib import Path

# XLA reads this once, so before JAX is imported: where few cores simulate many devices, one may wait long for the others.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import optax
import text
from flax import nnx
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import jaxpipe


class Experts(nnx.Module):
    """E feed-forward networks, of which each byte uses one (Switch Transformer: https://arxiv.org/abs/2101.03961).

    Shapes: T = B x L bytes, E experts, C places in each, D width, H hidden width.
    """

    def __init__(self, width: int, num_experts: int, capacity: float, coefficient: float, *, rngs: nnx.Rngs):
        self.capacity, self.coefficient = capacity, coefficient
        make = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(width, num_experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(make(rngs.params(), (num_experts, width, 4 * width)))  # [E, D, H]
        self.down = nnx.Param(make(rngs.params(), (num_experts, 4 * width, width)))  # [E, H, D]

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """[B, L, D] -> [B, L, D], the balance loss, and metrics."""
        num_experts = self.up.shape[0]
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        places = int(self.capacity * len(tokens) / num_experts)
        chances = jax.nn.softmax(self.router(tokens).astype(jnp.float32))  # [T, E]
        chosen = jax.nn.one_hot(chances.argmax(-1), num_experts)  # [T, E]
        # The place of a byte in its expert: how many before it have chosen the same. Bytes without one are passed on.
        place = (jnp.cumsum(chosen, 0) - 1) * chosen
        taken = chosen * (place < places)
        dispatch = taken[:, :, None] * jax.nn.one_hot(place.sum(-1).astype(jnp.int32), places)[:, None]  # [T, E, C]
        # Where experts lie on several devices, each computes its own, and the last sum is over the devices.
        inside = jaxpipe.parallel.constrain(jnp.einsum("tec,td->ecd", dispatch, tokens), P("expert"))
        hidden = jax.nn.gelu(jnp.einsum("ecd,edh->ech", inside, self.up[...]))
        outside = jnp.einsum("ech,ehd->ecd", hidden, self.down[...])
        y = jnp.einsum("tec,ecd->td", dispatch, outside) * (chances * taken).sum(-1, keepdims=True)

        share = chosen.mean(0)  # [E], of the bytes; has no derivative, but the chances have one
        unevenness = num_experts * (share * chances.mean(0)).sum()  # 1 if all experts get as much
        losses = {"balance": self.coefficient * unevenness}
        metrics = {"unevenness": unevenness, "passed on": 1 - taken.sum(-1).mean(), "share": jnp.sort(share)}
        return y.reshape(x.shape), losses, metrics


class Block(nnx.Module):
    """The block of `gpt.py`, with experts for its MLP."""

    def __init__(
        self, width: int, heads: int, num_experts: int, capacity: float, coefficient: float, *, rngs: nnx.Rngs
    ):
        self.heads = heads
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.experts = Experts(width, num_experts, capacity, coefficient, rngs=rngs)

    def __call__(self, x: jax.Array) -> jaxpipe.LayerOut:
        """[B, L, D] -> [B, L, D]."""
        query, key, value = jnp.split(self.qkv(self.norm_1(x)), 3, axis=-1)
        query, key, value = (a.reshape(*x.shape[:2], self.heads, -1) for a in (query, key, value))
        mixed = jax.nn.dot_product_attention(gpt.rotate(query), gpt.rotate(key), value, is_causal=True)
        x = x + self.attention_out(mixed.reshape(x.shape))
        y, losses, metrics = self.experts(self.norm_2(x))
        return jaxpipe.LayerOut(x + y, losses=losses, metrics=metrics)


def make_model(args: argparse.Namespace) -> jaxpipe.PipelineModule:
    block = args.d_model, args.heads, args.experts, args.capacity, args.coefficient
    layers = [
        jaxpipe.TiedLayerSpec("embedding", gpt.Embedding, args.d_model),
        *(jaxpipe.LayerSpec(Block, *block) for _ in range(args.num_blocks)),
        jaxpipe.LayerSpec(nnx.LayerNorm, args.d_model),
        jaxpipe.TiedLayerSpec("embedding", gpt.Embedding, args.d_model, forward_fn=gpt.Embedding.attend),
    ]
    # The first dim of the weights of experts is that of the experts.
    return jaxpipe.PipelineModule(layers, loss_fn=gpt.cross_entropy, sharding=[(r"experts/(up|down)", P("expert"))])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", type=int, default=4, help="pipeline stages")
    add("--data", type=int, default=1, help="data ranks")
    add("--expert", type=int, default=2, help="devices among which the experts of a block are shared out")
    add("--micro-batches", type=int, default=4, help="micro-batches per step")
    add("--rows", type=int, default=4, help="rows per micro-batch, over all data ranks")
    add("--seq", type=int, default=48, help="bytes of a row")
    add("--steps", type=int, default=60)
    add("--d-model", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--num-blocks", type=int, default=4)
    add("--experts", type=int, default=4, help="per block")
    add("--capacity", type=float, default=1.25, help="places of all experts together, per byte")
    add("--coefficient", type=float, default=0.01, help="of the balance loss")
    add("--output", type=Path, default=Path("demo_out"), help="folder for the picture")
    return parser.parse_args(arguments)


def draw(path: Path, history: list[dict[str, np.ndarray]], share: np.ndarray) -> None:
    """The loss, the unevenness, and how the bytes are shared out in the end."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")  # no pyplot: it would pick a window system
    left, middle, right = figure.subplots(1, 3)
    steps = np.arange(1, len(history) + 1)
    left.plot(steps, [step["loss"] - step["balance"] for step in history], color="#d1495b")
    left.set(title="loss of loss_fn", xlabel="step", ylabel="nats per byte")
    middle.plot(steps, [step["unevenness"] for step in history], color="#00798c")
    middle.axhline(1, color="#444444", linestyle="--", linewidth=1)
    middle.set(title="unevenness, mean over blocks (1: even)", xlabel="step")
    right.bar(np.arange(1, len(share) + 1), 100 * share[::-1], color="#edae49")
    right.axhline(100 / len(share), color="#444444", linestyle="--", linewidth=1)
    right.set(
        title="bytes per expert, validation",
        xlabel="expert, busiest first",
        ylabel="%",
        xticks=range(1, len(share) + 1),
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    count = args.stages * args.data * args.expert
    jax.config.update("jax_num_cpu_devices", count)  # not possible any more once JAX has looked for devices
    devices = jax.devices() if len(jax.devices()) >= count else jax.devices("cpu")
    mesh = jaxpipe.make_mesh(args.stages, args.data, expert=args.expert, devices=devices[:count])
    args.output.mkdir(parents=True, exist_ok=True)

    data = text.read_standard_library()
    batches = text.random_windows(data.train, rows=args.rows, length=args.seq, seed=0)
    # 30 rows in micro-batches of 8: the last one has fewer, and counts by its rows.
    validation = text.even_windows(data.validation, micro_batches=1, rows=30, length=args.seq)[0]
    validation = [tuple(a[first : first + 8] for a in validation) for first in range(0, 30, 8)]

    row = jax.ShapeDtypeStruct((args.rows, args.seq), np.int32)
    engine = jaxpipe.initialize(
        make_model(args),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 5e-3, max(1, args.steps // 10), max(2, args.steps)), b2=0.99
        ),
        mesh=mesh,
        example=(row, row),
        config=jaxpipe.Config(num_micro_batches=args.micro_batches, gradient_clipping=1.0),
        key=jax.random.key(0),
    )
    print(engine.summary())

    history: list[dict[str, jax.Array]] = []  # on the devices: reading a number would make the host wait for its step
    for step in range(1, args.steps + 1):
        engine.train_batch(batches)
        history.append(engine.metrics)
        if step % max(1, args.steps // 5) == 0 or step == 1:
            now = {name: float(value) for name, value in engine.metrics.items() if not value.shape}
            print(
                f"step {step:3d}: objective {now['loss']:.3f}, of which balance loss {now['balance']:.4f}; "
                f"unevenness {now['unevenness']:.2f}, passed on {now['passed on']:.1%}",
                flush=True,
            )
    found = engine.evaluate(validation)
    print(
        f"\nvalidation: loss {found['loss']:.3f} nats/byte ({found['loss'] / np.log(2):.3f} bits), and beside it the "
        f"balance loss {found['balance']:.4f}; unevenness {found['unevenness']:.2f}, passed on {found['passed on']:.1%}"
    )
    shares = " ".join(f"{share:.0%}" for share in found["share"][::-1])
    print(f"bytes per expert, the busiest of each block first, mean over the blocks: {shares}")
    picture = args.output / "mixture_of_experts.png"
    draw(picture, jax.device_get(history), found["share"])
    print(f"Picture: {picture}")


if __name__ == "__main__":
    try:
        main()
    except jaxpipe.errors.JaxpipeError as error:  # what was asked for does not fit; the message says why
        raise SystemExit(f"mixture_of_experts.py: {error}") from None
