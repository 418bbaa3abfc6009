"""Tokens per second of generation: the pipeline beside a loop on one device that has the same layers and the same caches.

Writes results/generate_<platform>_<date>.json and .md, and prints the table.
"""

import argparse
import functools
import os
import statistics
import sys
from pathlib import Path
from typing import Any

# XLA reads this once, so before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
from flax import nnx

import jaxpipe

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
import gpt  # noqa: E402


def make_plain(module: jaxpipe.PipelineModule, layers: list[Any], new: int, heads: int, width: int) -> Any:
    """`run(ids)` on one device: the prompt at once, then a loop over tokens that carries one cache per block."""
    made = [functools.partial(entry.target, *entry.args) for entry in module.entries]
    split = [nnx.split(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))) for make in made]

    def built(number: int, params: Any) -> Any:
        graph, state = split[number]
        module = nnx.merge(graph, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state))
        nnx.update(module, params)
        module.eval()
        return module

    @jax.jit
    def run(layers: list[Any], ids: jax.Array) -> jax.Array:
        modules = [built(number, params) for number, params in enumerate(layers[:-1])]
        rows, first = ids.shape
        empty = jnp.zeros((rows, first + new, heads, width // heads))

        def step(caches: Any, ids: jax.Array, position: Any) -> tuple[Any, jax.Array]:
            x, kept = modules[0](ids), []
            for block, cache in zip(modules[1:-1], caches, strict=True):
                x, cache = block(x, cache=cache, position=position)
                kept.append(cache)
            return kept, modules[0].attend(modules[-1](x[:, -1:]))[:, -1].argmax(-1).astype(jnp.int32)

        caches, token = step([(empty, empty)] * (len(modules) - 2), ids, 0)
        tokens = jnp.zeros((rows, new), jnp.int32).at[:, 0].set(token)

        def one(number: jax.Array, carry: Any) -> Any:
            caches, tokens, token = carry
            caches, token = step(caches, token[:, None], first + number - 1)
            return caches, tokens.at[:, number].set(token), token

        return jnp.concatenate([ids, jax.lax.fori_loop(1, new, one, (caches, tokens, token))[1]], axis=1)

    on_one = jax.device_put(jax.device_get(layers), jax.devices()[0])
    return lambda ids: run(on_one, ids)


def run(size: dict[str, int], stages: list[int], rounds: int) -> dict[str, Any]:
    """Times every number of stages beside the plain loop; stops if tokens differ."""
    module = gpt.make_gpt(width=size["width"], num_blocks=size["blocks"], heads=size["heads"], dropout=0.0)
    ids = np.random.default_rng(0).integers(0, 256, (size["rows"], size["prompt"])).astype(np.int32)
    pipes = [jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=count)) for count in stages]
    params = [pipe.init(0, ids) for pipe in pipes]
    plain = make_plain(module, pipes[0].to_layers(params[0]), size["new"], size["heads"], size["width"])
    calls = [lambda: plain(ids)]
    for pipe, own in zip(pipes, params, strict=True):
        calls.append(lambda pipe=pipe, own=own: pipe.generate(own, ids, size["new"]))
    wanted = np.asarray(calls[0]())
    for count, call in zip(stages, calls[1:], strict=True):
        if not np.array_equal(call(), wanted):
            raise SystemExit(f"S = {count} does not generate what the plain loop generates.")
    seconds = measure.interleave(calls, rounds)
    tokens = size["rows"] * size["new"]
    results = [
        {"stages": count, "seconds": own, "tokens_per_second": tokens / statistics.median(own)}
        | {"ratio": measure.ratio(seconds[0], own)}
        for count, own in zip(stages, seconds[1:], strict=True)
    ]
    return {
        **measure.machine(),
        "rounds": rounds,
        "model": size,
        "plain": {"seconds": seconds[0], "tokens_per_second": tokens / statistics.median(seconds[0])},
        "results": results,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table of one run."""
    size = found["model"]
    lines = [["plain loop", f"{found['plain']['tokens_per_second']:,.0f}", "1"]]
    lines += [
        [f"S = {r['stages']}", f"{r['tokens_per_second']:,.0f}", report.spread(r["ratio"])] for r in found["results"]
    ]
    kind = f"simulated devices that share {found['cores']} cores" if found["simulated"] else "devices"
    return (
        f"# Generation, {found['platform']}, {found['date']}\n\n"
        f"{size['blocks']} blocks of width {size['width']}, {size['rows']} prompts of {size['prompt']} bytes, "
        f"{size['new']} new ones each, greedy, float32; {kind}; jax {found['jax']}; {found['rounds']} rounds, medians "
        "(min-max). [How to read this](../README.md).\n\n"
        f"{report.table(['', 'tokens/s', 'speed / that of the plain loop'], lines)}\n"
    )


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of timing (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run? Prints only")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)  # means something only on a machine without accelerators
    size = {"width": 256, "blocks": 8, "heads": 4, "rows": 16, "prompt": 64, "new": 64}
    if arguments.quick:
        size |= {"width": 32, "blocks": 4, "rows": 4, "prompt": 8, "new": 4}
    stages = [count for count in (1, 2, 4) if count <= len(jax.devices())]
    found = run(size, stages, 2 if arguments.quick else arguments.rounds)
    text = markdown(found)
    print(f"\n{text}")
    if not arguments.quick:
        report.write(HERE / "results", found, text, "generate_")


if __name__ == "__main__":
    main()
