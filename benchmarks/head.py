"""Where the time of an evaluation goes when the vocabulary is large, and what it helps that all ranks share the head.

Writes results/head_<platform>_<date>.json and .md, and prints the table.
"""

import argparse
import functools
import os
import statistics
from pathlib import Path
from typing import Any

# XLA reads this once, so before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import measure
import model
import numpy as np
import report

import jaxpipe
from jaxpipe.model.context import Context

HERE = Path(__file__).parent
MICRO_BATCHES = 8


def loss_fn(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy, mean over [B, L]."""
    chosen = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def make_module(size: model.Size, vocabulary: int) -> jaxpipe.PipelineModule:
    """An embedding, blocks, and a head of its own weights; as many blocks on every rank, as training would have it."""

    def table(key: jax.Array, x: Any) -> dict[str, jax.Array]:
        return {"table": jax.random.normal(key, (vocabulary, size.width)) * 0.1}

    embedding = jaxpipe.Layer(table, lambda params, x: params["table"][x], "Embedding")
    head = jaxpipe.Layer(table, lambda params, x: x @ params["table"].T, "Head")
    block = jaxpipe.Layer(
        functools.partial(model.init_layer, size), functools.partial(model.apply_layer, size), "Block"
    )
    return jaxpipe.PipelineModule([embedding, *[block] * size.layers, head], loss_fn, partition_method="type:Block")


def parts(module: jaxpipe.PipelineModule, layers: list[Any], batch: Any, rounds: int) -> list[dict[str, Any]]:
    """FLOPs and seconds of one micro-batch, on one device: the embedding, all blocks, head and loss."""
    layers = jax.device_put(layers, jax.devices()[0])

    @jax.jit
    def blocks(layers: Any, x: jax.Array) -> jax.Array:
        for layer, params in zip(module.layers[1:-1], layers[1:-1], strict=True):
            x, _ = layer.apply(params, x, Context(), False)
        return x

    @jax.jit
    def head(layers: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = module.layers[-1].apply(layers[-1], x, Context(), False)
        return loss_fn(logits, labels)

    embed = jax.jit(lambda layers, x: module.layers[0].apply(layers[0], x, Context(), False)[0])
    inputs, labels = (jax.device_put(leaf[0], jax.devices()[0]) for leaf in batch)
    embedded = embed(layers, inputs)
    out = blocks(layers, embedded)
    runs = {
        "embedding": (embed, layers, inputs),
        "blocks": (blocks, layers, embedded),
        "head and loss": (head, layers, out, labels),
    }
    calls = [functools.partial(function, *arguments) for function, *arguments in runs.values()]
    jax.block_until_ready([call() for call in calls])
    seconds = measure.interleave(calls, rounds)
    found = []
    for (name, (function, *arguments)), times in zip(runs.items(), seconds, strict=True):
        analysis: Any = function.lower(*arguments).compile().cost_analysis()
        found.append({"part": name, "gflops": analysis["flops"] / 1e9, "seconds": statistics.median(times)})
    return found


def run(size: model.Size, vocabulary: int, stages: list[int], rounds: int) -> dict[str, Any]:
    """Everything, as the JSON holds it."""
    module = make_module(size, vocabulary)
    rng = np.random.default_rng(0)
    shape = (MICRO_BATCHES, size.rows, size.length)
    batch = rng.integers(0, vocabulary, shape), rng.integers(0, vocabulary, shape)
    results: list[dict[str, Any]] = []
    pieces = None
    for count in stages:
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=count), MICRO_BATCHES)
        params = pipe.init(jax.random.key(0), batch[0][0])
        if pieces is None:
            pieces = parts(module, jax.device_get(pipe.to_layers(params)), batch, rounds)
        calls, temp = [], []
        for spread in (False, True, None):
            calls.append(functools.partial(pipe.evaluate, params, batch, spread_loss=spread))
            compiled = pipe.lower_eval(params, batch, spread_loss=spread).compile()
            temp.append(compiled.memory_analysis().temp_size_in_bytes)
        losses = [call() for call in calls]
        for loss in losses[1:]:
            measure.check_equal(loss, losses[0], f"S = {count}")
        print(f"timing: S = {count}", flush=True)
        alone, shared, chosen = measure.interleave(calls, rounds)
        results.append(
            {
                "stages": count,
                "seconds_last_rank": alone,
                "seconds_shared": shared,
                "seconds_default": chosen,
                "ratio": measure.ratio(shared, alone),
                "ratio_default": measure.ratio(chosen, alone),
                "temp_bytes": temp[:2],
                "bound": _bound(pieces, count),
            }
        )
    return {
        **measure.machine(),
        "rounds": rounds,
        "model": {**vars(size), "vocabulary": vocabulary},
        "micro_batches": MICRO_BATCHES,
        "parts": pieces,
        "results": results,
    }


def _bound(pieces: list[dict[str, Any]], stages: int) -> float:
    """Shared / alone as it would be on `stages` devices of their own, without a bubble: by the time of the slowest rank."""
    seconds = {piece["part"]: piece["seconds"] for piece in pieces}
    own = seconds["blocks"] / stages
    return (own + seconds["head and loss"] / stages) / (own + seconds["head and loss"])


def markdown(found: dict[str, Any]) -> str:
    """The tables of one run."""
    size = found["model"]
    whole = sum(piece["seconds"] for piece in found["parts"])
    first = [
        [p["part"], f"{p['gflops']:.2f}", f"{1000 * p['seconds']:.1f}", f"{100 * p['seconds'] / whole:.0f} %"]
        for p in found["parts"]
    ]
    second = [
        [
            r["stages"],
            f"{statistics.median(r['seconds_last_rank']):.3f}",
            f"{statistics.median(r['seconds_shared']):.3f}",
            report.spread(r["ratio"]),
            report.spread(r["ratio_default"]),
            f"{r['bound']:.2f}",
            f"{r['temp_bytes'][0] / 1e6:.1f}",
            f"{r['temp_bytes'][1] / 1e6:.1f}",
        ]
        for r in found["results"]
    ]
    kind = f"simulated devices that share {found['cores']} cores" if found["simulated"] else "devices"
    head = ["S", "last rank, s", "shared, s", "shared / last rank", "default / last rank", "on S devices"]
    return (
        f"# Head and loss, {found['platform']}, {found['date']}\n\n"
        f"{size['layers']} blocks of width {size['width']}, vocabulary {size['vocabulary']:,}, sequence {size['length']}, "
        f"micro-batches of {size['rows']} rows, M = {found['micro_batches']}; {kind}; jax {found['jax']}; "
        f"{found['rounds']} rounds, medians (min-max). [How to read this](../README.md).\n\n"
        f"## One micro-batch on one device\n\n{report.table(['part', 'GFLOP', 'ms', 'of the time'], first)}\n\n"
        f"## An evaluation\n\n{report.table([*head, 'temp MB', 'temp MB, shared'], second)}\n"
    )


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of timing (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run? Prints only")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)  # means something only on a machine without accelerators
    size = model.Size(layers=4, width=32, length=16, rows=2) if arguments.quick else model.Size()
    stages = [count for count in (2, 4) if count <= len(jax.devices())]
    if not stages:
        parser.error("it takes two devices or more to share something.")
    vocabulary, rounds = (512, 2) if arguments.quick else (arguments.vocabulary, arguments.rounds)
    found = run(size, vocabulary, stages, rounds)
    text = markdown(found)
    print(f"\n{text}")
    if not arguments.quick:
        report.write(HERE / "results", found, text, "head_")


if __name__ == "__main__":
    main()
