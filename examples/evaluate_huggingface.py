"""Evaluates a GPT-2 or Llama checkpoint of Hugging Face in a pipeline: perplexity of a text file.

    python examples/evaluate_huggingface.py FOLDER --text FILE --stages 4
    python -m jaxpipe launch -n 2 --devices-per-process 2 examples/evaluate_huggingface.py FOLDER --text FILE --stages 4

FOLDER has config.json and *.safetensors, as `save_pretrained` writes them; for --text also a tokenizer, which needs
`pip install transformers`. Nothing of this needs torch.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import gpt2
import jax
import llama
import numpy as np
import optax
from safetensors.numpy import load_file

import jaxpipe

FAMILIES = {"gpt2": gpt2, "llama": llama}


def loss_fn(logits: jax.Array, labels: jax.Array) -> Any:
    """Nats per token over those with a label, and how many tokens were the likeliest; -1 is no label."""
    real = labels >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jax.numpy.maximum(labels, 0))
    count = real.sum()
    return jaxpipe.Weighted((each * real).sum(), count), {
        "accuracy": (((logits.argmax(-1) == labels) & real).sum(), count)
    }


def load(folder: Path) -> tuple[jaxpipe.PipelineModule, list[Any]]:
    """The model of a folder, and per layer its params."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise SystemExit(f"{folder} has a model of the type {config['model_type']!r}; known are {', '.join(FAMILIES)}.")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        # In float32, whatever the checkpoint has: the layers compute in what they hold.
        tensors |= {name: np.asarray(tensor, np.float32) for name, tensor in load_file(file).items()}
    return jaxpipe.PipelineModule(family.make_layers(config), loss_fn), family.convert(tensors, config)


def make_engine(folder: Path, *, stages: int, data: int, rows: int, length: int, micro_batches: int) -> jaxpipe.Engine:
    """An engine with the weights of a folder, for micro-batches [rows, length] of tokens."""
    module, layers = load(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    most = config.get("n_positions", config.get("max_position_embeddings", length))
    if length > most:
        raise SystemExit(f"Windows of {length} tokens: this model has {most} positions. Use --length {most}.")
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32)
    return jaxpipe.initialize(
        module,
        optax.identity(),  # nothing is trained: an optimizer without state
        mesh=jaxpipe.make_mesh(stages, data),
        example=(tokens, tokens),
        config={"num_micro_batches": micro_batches},
        layers=layers,
    )


def windows(tokens: np.ndarray, rows: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Micro-batches of windows side by side; each token but the first is predicted once. The last window is filled up."""
    count = max(1, math.ceil((len(tokens) - 1) / length))
    padded = np.full(count * length + 1, -1, np.int32)
    padded[: len(tokens)] = tokens
    inputs, labels = np.maximum(padded[:-1], 0).reshape(count, length), padded[1:].reshape(count, length)
    for start in range(0, count, rows):
        yield inputs[start : start + rows], labels[start : start + rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with config.json and *.safetensors")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--data", type=int, default=1, help="data ranks")
    parser.add_argument("--rows", type=int, default=4, help="windows per micro-batch, on all data ranks")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--micro-batches", type=int, default=8)
    args = parser.parse_args(arguments)
    from transformers import AutoTokenizer

    if not jax.distributed.is_initialized():
        jax.config.update("jax_num_cpu_devices", args.stages * args.data)  # means something only without accelerators
    tokens = np.asarray(AutoTokenizer.from_pretrained(args.folder)(args.text.read_text(encoding="utf-8"))["input_ids"])
    engine = make_engine(
        args.folder,
        stages=args.stages,
        data=args.data,
        rows=args.rows,
        length=args.length,
        micro_batches=args.micro_batches,
    )
    first = jax.process_index() == 0
    if first:
        print(f"{len(tokens):,} tokens, {args.stages} stages cut at {engine.partition}")
    found = engine.evaluate(windows(tokens, args.rows, args.length))
    if first:
        print(
            f"loss {found['loss']:.4f} nats/token, perplexity {math.exp(found['loss']):.2f}, {found['accuracy']:.1%} right"
        )


if __name__ == "__main__":
    jaxpipe.start()
    main()
