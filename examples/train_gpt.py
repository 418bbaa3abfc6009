"""Trains a small GPT on Python's standard library, in a pipeline of simulated devices or real ones, within minutes.

Run it with `make demo`, or `python examples/train_gpt.py --help` for other sizes and schedules. It runs as it is in several
processes: `python -m jaxpipe launch -n 2 --devices-per-process 4 examples/train_gpt.py`.
"""

import argparse
import os
from pathlib import Path

# XLA reads this once, so before JAX is imported. Where few cores simulate many devices, one may wait long for the
# others, and by default XLA takes a long wait for a deadlock.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import gpt
import jax
import numpy as np
import optax
import pictures
import text

import jaxpipe

PROMPT = b"    def __init__(self, "
TEMPERATURE = 0.6  # for the bytes drawn at random: below 1, likely bytes become likelier


def say(text: str) -> None:
    """Prints in one of the processes only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def remat(value: str) -> str | int:
    return int(value) if value.isdigit() else value


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--stages", type=int, default=4, help="pipeline stages, each on its own devices")
    add("--data", type=int, default=2, help="data ranks: devices per stage, which share the rows of a micro-batch")
    add("--micro-batches", type=int, default=8, help="micro-batches per step")
    add("--micro-batch-size", type=int, default=2, help="rows per micro-batch, over all data ranks")
    add("--schedule", choices=["1f1b", "eager_1f1b", "gpipe"], default="1f1b")
    add(
        "--remat",
        type=remat,
        default="layer",
        help="what is saved for the backward pass: layer, stage, a number of layers, dots, or none",
    )
    add("--steps", type=int, default=260)
    add("--seq", type=int, default=128, help="bytes of a row")
    add("--d-model", type=int, default=144)
    add("--num-blocks", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--dropout", type=float, default=0.05)
    add("--learning-rate", type=float, default=3e-3, help="at its peak, after the warm-up")
    add("--eval-every", type=int, default=26, help="steps between evaluations")
    add("--sample-bytes", type=int, default=160, help="length of the samples at the end, at most")
    add("--seed", type=int, default=0)
    add("--checkpoints", type=Path, help="folder to save to at every evaluation, and to go on from if it has something")
    add("--output", type=Path, default=Path("demo_out"), help="folder for the pictures")
    args = parser.parse_args(arguments)
    if args.d_model % (2 * args.heads):
        parser.error(f"--d-model {args.d_model}: it must be a multiple of 2 x heads, which is {2 * args.heads}.")
    return args


def find_devices(count: int) -> list[jax.Device] | None:
    """The first `count` accelerators if there are as many; otherwise as many simulated devices on the CPU.

    None leaves the choice to `make_mesh`, which knows best how to lay a mesh over several processes.
    """
    if jax.distributed.is_initialized():
        return None
    jax.config.update("jax_num_cpu_devices", count)  # not possible any more once JAX has looked for devices
    devices = jax.devices()
    if len(devices) < count:
        devices = jax.devices("cpu")
        jax.config.update("jax_default_device", devices[0])
    return devices[:count]


def make_optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine decay; only matrices decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), max(2, steps), peak / 50)

    def matrices(params):
        return jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)

    return optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=matrices)


def describe(args: argparse.Namespace, engine: jaxpipe.Engine, module: jaxpipe.PipelineModule, data: text.Text) -> None:
    """Says what is about to be trained, on what, and cut how."""
    devices = engine.pipe.mesh.devices
    kind = devices.flat[0].platform
    simulated = (
        f", simulated on {os.cpu_count()} cores: the speed says nothing about real ones" if kind == "cpu" else ""
    )
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(layer)) for layer in engine.to_layers()]
    say(f"devices     {args.stages} stages x {args.data} data ranks = {devices.size} x {kind}{simulated}")
    say(
        f"model       {sum(sizes) / 1e6:.2f} M parameters: {args.num_blocks} blocks of width {args.d_model}, "
        f"{args.heads} heads, dropout {args.dropout:g}"
    )
    for stage, (first, end) in enumerate(zip(engine.partition, engine.partition[1:], strict=False)):
        names = [layer_name(module, index) for index in range(first, end)]
        runs = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
        say(f"  stage {stage}   {', '.join(runs)}: {sum(sizes[first:end]) / 1e6:.2f} M")
    rows = f"{args.micro_batches} micro-batches x {args.micro_batch_size} rows x {args.seq} bytes"
    say(f"step        {rows}, schedule {args.schedule}")
    say(
        f"data        {len(data.train) / 1e6:.1f} MB in {data.train_files} files of Python's standard library; "
        f"{len(data.validation) / 1e6:.1f} MB in {data.validation_files} other files for validation"
    )


def layer_name(module: jaxpipe.PipelineModule, index: int) -> str:
    return "head (tied to Embedding)" if module.owners[index] != index else module.layers[index].name


def train(
    args: argparse.Namespace, engine: jaxpipe.Engine, data: text.Text, validation: list[text.Batch]
) -> tuple[list[float], list[tuple[int, float]]]:
    """The loss of every step, and pairs (step, validation loss)."""
    history, folder = jaxpipe.callbacks.History(), args.checkpoints
    saving = {} if folder is None else {"checkpoint_dir": folder, "checkpoint_every": args.eval_every, "keep": 2}
    say("\ncompiling the training step")
    jaxpipe.Trainer(
        engine,
        text.random_windows(data.train, rows=args.micro_batch_size, length=args.seq, seed=args.seed),
        steps=args.steps,
        eval_data=validation,
        eval_every=args.eval_every,
        eval_first=True,
        callbacks=[history, jaxpipe.callbacks.ProgressBar()],
        **saving,
    ).run()
    losses, evaluations = history.curve("loss"), history.curve("loss", evaluations=True)
    return losses[1], list(zip(*evaluations, strict=True))


def sample(engine: jaxpipe.Engine, prompt: bytes, *, length: int, count: int, seed: int) -> list[str]:
    """Continues the prompt by `count` bytes in two ways: always the most likely byte, and a byte drawn at random.

    No more than fit into the `length` bytes of a row that the model was trained on: it knows no later places.
    """
    prompt = prompt[-(length - 1) :]
    count, ids = min(count, length - len(prompt)), np.frombuffer(prompt, np.uint8)[None]
    greedy = engine.generate(ids, max_new_tokens=count)
    drawn = engine.generate(ids, max_new_tokens=count, temperature=TEMPERATURE, key=seed)
    return [np.asarray(row[0]).astype(np.uint8).tobytes().decode(errors="replace").rstrip() for row in (greedy, drawn)]


def main(arguments: list[str] | None = None) -> None:
    jaxpipe.start()  # does nothing where this is the only process
    args = parse_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    mesh = jaxpipe.make_mesh(args.stages, args.data, devices=find_devices(args.stages * args.data))
    data = text.read_standard_library()
    validation = text.even_windows(data.validation, micro_batches=16, rows=4 * args.data, length=args.seq)
    module = gpt.make_gpt(width=args.d_model, num_blocks=args.num_blocks, heads=args.heads, dropout=args.dropout)
    row = jax.ShapeDtypeStruct((args.micro_batch_size, args.seq), np.int32)
    engine = jaxpipe.initialize(
        module,
        make_optimizer(args.learning_rate, args.steps),
        mesh=mesh,
        example=(row, row),
        config=jaxpipe.Config(
            num_micro_batches=args.micro_batches,
            schedule=args.schedule,
            remat=args.remat,
            gradient_clipping=1.0,
        ),
        key=jax.random.key(args.seed),
    )
    say(engine.summary())
    describe(args, engine, module, data)
    losses, evaluations = train(args, engine, data, validation)

    greedy, drawn = sample(engine, PROMPT, length=args.seq, count=args.sample_bytes, seed=args.seed)
    say(f"\n--- after {PROMPT.decode()!r}, the most likely byte each time\n{greedy}")
    say(f"\n--- the same, each byte drawn at random (temperature {TEMPERATURE})\n{drawn}")

    bigram = text.bigram_loss(data.train, validation)
    last = losses[-max(1, len(losses) // 10) :]
    say("\nloss                      nats/byte  bits/byte")
    report("training", sum(last) / len(last), f"mean of the last {len(last)} steps, with dropout")
    report(
        "validation",
        evaluations[-1][1],
        f"{sum(labels.size for _, labels in validation):,} bytes of files never trained on",
    )
    report("bigram model, validation", bigram, "the same bytes, each predicted from the one before it")

    timeline = args.output / "schedule.png"
    if jax.process_index() == 0:
        pictures.draw_curves(args.output / "loss.png", losses, evaluations, bigram)
        jaxpipe.schedules.draw(engine.pipe.schedule, timeline, name=args.schedule)
    say(f"\nPictures: {args.output / 'loss.png'}, {timeline}")


def report(name: str, nats: float, remark: str) -> None:
    say(f"{name:<25} {nats:9.3f} {nats / np.log(2):10.3f}   {remark}")


if __name__ == "__main__":
    try:
        main()
    except jaxpipe.errors.JaxpipeError as error:  # what was asked for does not fit; the message says why
        raise SystemExit(f"train_gpt.py: {error}") from None
