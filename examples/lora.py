"""LoRA on a small GPT-2: the weights of a safetensors file are frozen, and small adapters beside them are trained.

Run it with `python examples/lora.py`; it takes about a minute on simulated devices. It first makes a tiny GPT-2 in the form
of Hugging Face (config.json and model.safetensors), which has learned to count by ones, twos and threes. Then adapters
teach it to count by sevens. They are saved alone, and loaded again beside the same base. `--base FOLDER` takes a GPT-2 of
your own.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import gpt2
import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

import jaxpipe

NUMBERS, LENGTH, ROWS = 48, 16, 32
CONFIG = {
    "vocab_size": NUMBERS,
    "n_positions": LENGTH,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
    "layer_norm_epsilon": 1e-5,
}


class Adapted(gpt2.Block):
    """A block of GPT-2 with adapters: W + A B in the place of W; A is [in, rank], and B [rank, out] is zeros at first."""

    def __init__(self, width: int, heads: int, inner: int, epsilon: float, rank: int, *, rngs: nnx.Rngs):
        super().__init__(width, heads, inner, epsilon, rngs=rngs)
        self.qkv = nnx.LoRALinear(width, 3 * width, lora_rank=rank, rngs=rngs)
        self.mlp_in = nnx.LoRALinear(width, inner, lora_rank=rank, rngs=rngs)


def loss_fn(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Nats per number, and the part of the numbers that are right; two are needed to know the step."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)[:, 1:]
    return each.mean(), {"right": (logits.argmax(-1) == labels)[:, 1:].mean()}


def counting(steps: tuple[int, ...], seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Micro-batches of numbers that count by one of some steps, modulo NUMBERS, and the numbers that come next."""
    rng = np.random.default_rng(seed)
    while True:
        start, step = rng.integers(0, NUMBERS, (ROWS, 1)), rng.choice(steps, (ROWS, 1))
        rows = ((start + step * np.arange(LENGTH + 1)) % NUMBERS).astype(np.int32)
        yield rows[:, :-1], rows[:, 1:]


def make_base(folder: Path, mesh: Any, steps: int) -> None:
    """Trains a tiny GPT-2, and writes it as Hugging Face does."""
    module, data = jaxpipe.PipelineModule(gpt2.make_layers(CONFIG), loss_fn), counting((1, 2, 3), seed=0)
    rate = optax.cosine_decay_schedule(3e-3, steps + 1)
    config = {"num_micro_batches": 4, "remat": "none"}
    engine = jaxpipe.initialize(module, optax.adam(rate), mesh=mesh, example=next(data), config=config)
    for _ in range(steps):
        loss = engine.train_batch(data)
    print(f"base: counts by ones, twos and threes with a loss of {loss:.3f}")
    names = {"norm_1": "ln_1", "qkv": "attn.c_attn", "attention_out": "attn.c_proj", "norm_2": "ln_2"}
    names |= {"mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
    embedding, *blocks, norm, _ = jaxpipe.fetch(engine.to_layers())
    tensors = {"wte.weight": embedding["tokens"], "wpe.weight": embedding["positions"]}
    parts = {f"h.{i}.{names[name]}": part for i, block in enumerate(blocks) for name, part in block.items()}
    for name, part in {**parts, "ln_f": norm}.items():
        tensors |= {f"{name}.weight": part.get("kernel", part.get("scale")), f"{name}.bias": part["bias"]}
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def read_base(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The configuration of a GPT-2, and per layer its params."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: np.asarray(tensor, np.float32) for name, tensor in load_file(file).items()}
    return config, gpt2.convert(tensors, config)


def make_engine(folder: Path, mesh: Any, rank: int, steps: int, trainable: str | None) -> jaxpipe.Engine:
    """An engine with the base of a folder and fresh adapters beside it."""
    config, base = read_base(folder)
    embed, *blocks, norm, head = gpt2.make_layers(config)
    layers = [embed, *(jaxpipe.LayerSpec(Adapted, *block.args, rank) for block in blocks), norm, head]
    module, example = jaxpipe.PipelineModule(layers, loss_fn), next(counting((7,), seed=0))
    fresh = jaxpipe.Pipeline(module, mesh, num_micro_batches=4)
    own = jaxpipe.fetch(fresh.to_layers(fresh.init(1, example[0])))
    return jaxpipe.initialize(
        module,
        optax.adam(optax.cosine_decay_schedule(2e-2, steps + 1)),
        mesh=mesh,
        example=example,
        config={"num_micro_batches": 4},
        layers=[merged(a, b) for a, b in zip(own, base, strict=True)],
        trainable=trainable,
    )


def merged(own: Any, base: Any) -> Any:
    """Params of a layer with what the base has in the place of what was made afresh."""
    if not isinstance(own, dict):
        return base
    return {name: merged(held, base[name]) if name in base else held for name, held in own.items()}


def optimizer_bytes(engine: jaxpipe.Engine) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.state.opt_state))


def draw(path: Path, losses: list[float], before: float) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(losses, color="#d1495b", label="with adapters")
    axes.axhline(before, color="#8d99ae", linestyle="--", label="the base alone")
    axes.set(xlabel="step", ylabel="loss, nats per number", title="LoRA: a frozen GPT-2 learns to count by sevens")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", type=Path, help="a folder with a GPT-2; by default a tiny one is made")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--base-steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("demo_out"))
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_num_cpu_devices", args.stages)
    mesh = jaxpipe.make_mesh(pipe=args.stages, devices=jax.devices("cpu")[: args.stages])
    folder = args.base or args.output
    if args.base is None:
        make_base(folder, mesh, args.base_steps)

    engine = make_engine(folder, mesh, args.rank, args.steps, trainable="lora")
    print(engine.summary(), end="\n\n")
    test = [batch for batch, _ in zip(counting((7,), seed=2), range(8), strict=False)]
    before, data = engine.evaluate(test), counting((7,), seed=1)
    losses = [float(engine.train_batch(data)) for _ in range(args.steps)]
    after = engine.evaluate(test)
    print(f"the base alone: loss {before['loss']:.3f}, {100 * before['right']:.1f} % of the numbers are right")
    print(f"with adapters: loss {after['loss']:.3f}, {100 * after['right']:.1f} % of the numbers are right")

    file = args.output / "adapters.safetensors"
    jaxpipe.save_weights(file, engine, only="lora")
    whole = sum(a.nbytes for a in jax.tree.leaves(engine.to_layers()))
    print(f"{file}: {file.stat().st_size:,} bytes, of {whole:,} bytes of weights")
    again = make_engine(folder, mesh, args.rank, args.steps, trainable=None)  # trains everything
    jaxpipe.load_weights(file, again)
    print(f"loaded beside the same base: loss {again.evaluate(test)['loss']:.3f}")
    part, full = optimizer_bytes(engine), optimizer_bytes(again)
    print(f"optimizer state: {part:,} bytes with adapters, {full:,} for all weights ({100 * part / full:.1f} %)")
    draw(args.output / "lora.png", losses, before["loss"])
    print(f"Picture: {args.output / 'lora.png'}")


if __name__ == "__main__":
    main()
