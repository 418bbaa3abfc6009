"""Memory, time and compile time of models whose stages are not alike, against one device.

    python benchmarks/unlike.py                    # bytes of all models at S = 1, 2, 4, 8, seconds of the ResNet
    python benchmarks/unlike.py --only memory

Nothing is computed for the bytes: programs are compiled from shapes. Writes results/unlike_<platform>_<date>.json and .md.
"""

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import unlike_models

import jaxpipe

HERE = Path(__file__).parent
ROWS = {"resnet": 8, "gpt": 8, "vision_text": 8}  # of a micro-batch
MICRO_BATCHES = 8


def make_pipe(name: str, stages: int, rows: int, method: Any = "parameters") -> tuple[jaxpipe.Pipeline, Any, Any]:
    """(pipeline, shapes of a micro-batch, those of a batch)."""
    module = jaxpipe.PipelineModule(unlike_models.MODELS[name](), unlike_models.cross_entropy, partition_method=method)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages), MICRO_BATCHES)
    example = unlike_models.example(name, rows)
    pipe.check(example)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((MICRO_BATCHES, *a.shape), a.dtype), example)
    return pipe, example, batch


def bytes_of(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


# --------------------------------------------------------------------------------------------------------------- memory


def memory(name: str, stages: int) -> dict[str, Any]:
    """Bytes of a device, beside what the stage that needs most takes on one device by itself.

    The latter is a program that runs as many micro-batches forward as the stage has in flight, keeping the input of each
    layer, and then backward: its weights, its inputs, its temporary memory, and the sums of gradients, which it returns.
    """
    pipe, example, batch = make_pipe(name, stages, ROWS[name])
    compiled: Any = pipe.lower_train(pipe.layout.shapes(), batch).compile().memory_analysis()
    shapes = pipe.module.shapes(example[0])
    total = sum(bytes_of(each.params) for each in shapes)
    needs = [_need(pipe, shapes, example[1], stage) for stage in range(stages)]
    found = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    limit = max(needs) + total / stages
    return {
        "model": name,
        "stages": stages,
        "weights": total,
        "arguments": compiled.argument_size_in_bytes,
        "temporary": compiled.temp_size_in_bytes,
        "largest_stage": max(needs),
        "ratio": found / limit,
    }


def _need(pipe: jaxpipe.Pipeline, shapes: Sequence[Any], labels: Any, stage: int) -> int:
    first, end = pipe.partition[stage : stage + 2]
    in_flight, is_last = pipe.program.saved_per_rank[stage], end == len(shapes)
    applies = [entry.apply if isinstance(entry, jaxpipe.Layer) else None for entry in pipe.module.entries[first:end]]
    outputs = [a for a in jax.tree.leaves(shapes[end - 1].outputs) if jnp.issubdtype(a.dtype, jnp.inexact)]
    target = labels if is_last else outputs

    def one(params: Any, x: Any, t: Any) -> jax.Array:
        for apply, held in zip(applies, params, strict=True):
            assert apply is not None
            x = jax.checkpoint(apply)(held, x)
        if is_last:
            return unlike_models.cross_entropy(x, t)
        floats = [a for a in jax.tree.leaves(x) if jnp.issubdtype(a.dtype, jnp.inexact)]
        return sum((jnp.vdot(a, b) for a, b in zip(floats, t, strict=True)), jnp.float32(0))

    def all_of(params: Any, floats: Any, xs: Any, ts: Any) -> jax.Array:
        given = iter(floats)
        xs = jax.tree.map(lambda a: next(given) if jnp.issubdtype(a.dtype, jnp.inexact) else a, xs)
        return jax.lax.scan(lambda sum_, each: (sum_ + one(params, *each), None), jnp.float32(0), (xs, ts))[0]

    def several(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((in_flight, *a.shape), a.dtype), tree)

    xs, params = several(shapes[first].inputs), [each.params for each in shapes[first:end]]
    floats = [a for a in jax.tree.leaves(xs) if jnp.issubdtype(a.dtype, jnp.inexact)]
    gradient = jax.jit(jax.value_and_grad(all_of, argnums=(0, 1) if stage else 0))
    found: Any = gradient.lower(params, floats, xs, several(target)).compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes


# ------------------------------------------------------------------------------------------------------------- seconds


def plain_loop(pipe: jaxpipe.Pipeline) -> Callable[..., Any]:
    """What one would write for one device: a scan over micro-batches that adds up gradients, each layer checkpointed."""
    layers = pipe.module.entries

    def loss(params: Any, x: Any, t: Any) -> jax.Array:
        for layer, held in zip(layers, params, strict=True):
            assert isinstance(layer, jaxpipe.Layer)
            x = jax.checkpoint(layer.apply)(held, x)
        return unlike_models.cross_entropy(x, t)

    def step(params: Any, inputs: Any, labels: Any) -> Any:
        def add(carry: Any, each: Any) -> Any:
            found = jax.value_and_grad(loss)(params, *each)
            return jax.tree.map(jnp.add, carry, found), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        found, _ = jax.lax.scan(add, zeros, (inputs, labels))
        return jax.tree.map(lambda a: a / MICRO_BATCHES, found)

    return jax.jit(step)


def seconds(stages: int, rounds: int, rows: int) -> dict[str, Any]:
    """A step of the ResNet, cut by FLOPs, and of the plain loop, in turns, with micro-batches of so many rows."""
    pipe, _, batch = make_pipe("resnet", stages, rows, "cost")
    noise = np.random.default_rng(0)
    inputs = noise.normal(size=batch[0].shape).astype(np.float32)
    labels = noise.integers(0, 10, batch[1].shape).astype(np.int32)
    params = pipe.init(0, inputs[0])
    layers = jax.device_put(jax.device_get(pipe.to_layers(params)), jax.devices()[0])
    loop = plain_loop(pipe)
    start = time.perf_counter()
    found = jax.block_until_ready(pipe.value_and_grad(params, (inputs, labels)))
    middle = time.perf_counter()
    wanted = jax.block_until_ready(loop(layers, inputs, labels))
    end = time.perf_counter()
    measure.check_equal((found[0], pipe.to_layers(found[1])), wanted, "the pipeline")
    ours, theirs = measure.interleave(
        [lambda: pipe.value_and_grad(params, (inputs, labels)), lambda: loop(layers, inputs, labels)], rounds
    )
    return {
        "stages": stages,
        "rows": rows,
        "first_call": middle - start,
        "first_call_of_loop": end - middle,
        "step": statistics.median(ours),
        "loop": statistics.median(theirs),
        "least_ratio": min(a / b for a, b in zip(ours, theirs, strict=True)),
        "ratio_of_least": min(ours) / min(theirs),
        "ratio": measure.ratio(ours, theirs),
    }


# -------------------------------------------------------------------------------------------------------------- report


def report(found: dict[str, Any]) -> str:
    lines = []
    if found["memory"]:
        lines += [
            "Bytes of a device in MB, and their ratio to the largest stage by itself + weights / S:",
            "",
            "| model | S | weights of the model | arguments | temporary | largest stage by itself | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["memory"]:
            sizes = [f"{row[key] / 1e6:.1f}" for key in ("weights", "arguments", "temporary", "largest_stage")]
            lines.append(f"| {row['model']} | {row['stages']} | {' | '.join(sizes)} | {row['ratio']:.2f} |")
        lines.append("")
    if found["seconds"]:
        lines += [
            "Seconds of a step of the ResNet, in turns with the plain loop on one device; "
            f"rows of a micro-batch: {found['seconds'][0]['rows']}",
            "",
            "| S | step | loop | ratio: median (least, greatest) | ratio of the least | first call | that of the loop |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["seconds"]:
            ratio = row["ratio"]
            lines.append(
                f"| {row['stages']} | {row['step']:.2f} | {row['loop']:.2f} | {ratio['median']:.2f} ({ratio['min']:.2f}, "
                f"{ratio['max']:.2f}) | {row['ratio_of_least']:.2f} | {row['first_call']:.1f} | "
                f"{row['first_call_of_loop']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "seconds"])
    parser.add_argument("--models", nargs="*", default=list(unlike_models.MODELS))
    parser.add_argument("--stages", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch, where seconds are measured (default: 1)")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    found: dict[str, Any] = {"jax": jax.__version__, "memory": [], "seconds": []}
    if arguments.only != "seconds":
        for name in arguments.models:
            for stages in arguments.stages:
                found["memory"].append(memory(name, stages))
                print(found["memory"][-1], flush=True)
    if arguments.only != "memory":
        for stages in arguments.stages:
            found["seconds"].append(seconds(stages, arguments.rounds, arguments.rows))
            print(found["seconds"][-1], flush=True)
    text = report(found)
    print(text)
    name = f"unlike_{jax.default_backend()}_{datetime.date.today()}"
    (HERE / "results" / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "results" / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
