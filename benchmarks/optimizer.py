"""What it costs that an optimizer acts layer by layer, beside the same one on stacks as leaves and on the plain layers.

The stacks as leaves are the cheapest thing that could be done, and wrong for whatever looks at shapes, paths or norms.
Writes results/optimizer_<platform>_<date>.json and .md, and prints the table.
"""

import argparse
import functools
import os
import re
import statistics
from pathlib import Path
from typing import Any

# XLA reads this once, so before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import measure
import model
import optax
import report

import jaxpipe

HERE = Path(__file__).parent
COLLECTIVE = re.compile(r"= \S.* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Those that are timed."""

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.ndim > 1, tree)

    decay = optax.adamw(1e-3, weight_decay=0.1, mask=matrices)
    return {
        "adam": optax.adam(1e-3),
        "adamw, mask by ndim": decay,
        "clip by global norm, adamw": optax.chain(optax.clip_by_global_norm(1.0), decay),
        "lamb": optax.lamb(1e-3),
        "muon": optax.contrib.muon(1e-3),
    }


def one(name: str, tx: optax.GradientTransformation, size: model.Size, stages: int, rounds: int) -> dict[str, Any]:
    """Times, program and collectives of one optimizer at one number of stages."""
    block = jaxpipe.Layer(functools.partial(model.init_layer, size), lambda params, x: x, "Block")
    module = jaxpipe.PipelineModule([block] * size.layers, partition_method="uniform")
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages))
    params = pipe.init(jax.random.key(0), jnp.zeros(size.micro_batch))
    layers = dict(enumerate(jax.device_put(jax.device_get(pipe.to_layers(params)), jax.devices()[0])))
    found: dict[str, Any] = {"optimizer": name, "layers": size.layers, "stages": stages}
    calls = []
    for label, mine, tree in (("by layer", pipe.optimizer(tx), params), ("stacks", tx, params), ("plain", tx, layers)):
        lies = {a.shape: a.sharding for a in jax.tree.leaves(tree)}  # moments lie as their params do
        rest = jax.sharding.NamedSharding(pipe.mesh, jax.sharding.PartitionSpec()) if tree is params else None
        state = jax.jit(mine.init)(tree)
        state = jax.tree.map(lambda a, lies=lies, rest=rest: jax.device_put(a, lies.get(a.shape, rest)), state)
        shardings = jax.tree.map(lambda a: a.sharding, (tree, state))

        @functools.partial(jax.jit, out_shardings=shardings)
        def step(grads: Any, state: Any, tree: Any, mine: Any = mine) -> Any:
            updates, state = mine.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state

        found[label] = measure.compile_and_describe(step, tree, state, tree)
        compiled = step.lower(tree, state, tree).compile()
        found[label]["collectives"] = len(COLLECTIVE.findall(compiled.as_text()))
        calls.append(lambda step=step, tree=tree, state=state: step(tree, state, tree))
    for call in calls:
        jax.block_until_ready(call())
    print(f"timing: {name}, {size.layers} layers, S = {stages}", flush=True)
    for label, seconds in zip(("by layer", "stacks", "plain"), measure.interleave(calls, rounds), strict=True):
        found[label]["seconds"] = seconds
    found["ratio"] = measure.ratio(found["by layer"]["seconds"], found["stacks"]["seconds"])
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table of one run."""
    rows = []
    for r in found["results"]:
        ours, stacks, plain = r["by layer"], r["stacks"], r["plain"]
        rows.append(
            [
                r["optimizer"],
                r["layers"],
                r["stages"],
                report.spread(r["ratio"]),
                f"{1000 * statistics.median(ours['seconds']):.1f}",
                ours["collectives"],
                *(
                    f"{x['trace_seconds'] + x['lower_seconds']:.1f} + {x['xla_seconds']:.1f}"
                    for x in (ours, stacks, plain)
                ),
                *(x["hlo_lines"] for x in (ours, stacks, plain)),
                f"{ours['temp_bytes'] / 1e6:.1f} / {stacks['temp_bytes'] / 1e6:.1f}",
            ]
        )
    kind = f"simulated devices that share {found['cores']} cores" if found["simulated"] else "devices"
    head = ["optimizer", "layers", "S", "time / stacks", "ms", "collectives", "trace + compile, s", "stacks", "plain"]
    return (
        f"# Optimizer, {found['platform']}, {found['date']}\n\n"
        f"Blocks of width {found['width']}; {kind}; jax {found['jax']}; {found['rounds']} rounds, medians (min-max). "
        "By layer, beside the same optimizer on the stacks as leaves (which is another optimizer unless it is elementwise) "
        "and on the plain layers on one device. [How to read this](../README.md).\n\n"
        f"{report.table([*head, 'HLO lines', 'stacks', 'plain', 'temp MB / stacks'], rows)}\n"
    )


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds of timing (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run? Prints only")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)  # means something only on a machine without accelerators
    width, rounds = (32, 2) if arguments.quick else (arguments.width, arguments.rounds)
    stages = [count for count in (1, 4) if count <= len(jax.devices())]
    results = []
    for name, tx in optimizers().items():
        cases = [(8, count) for count in stages] + ([(64, stages[-1])] if name.startswith("adam") else [])
        for layers, count in cases:
            # 64 layers are about the size of the program: narrow ones do.
            size = model.Size(layers=layers, width=width if layers == 8 else width // 4)
            results.append(one(name, tx, size, count, rounds))
    found = {
        **measure.machine(),
        "rounds": rounds,
        "width": width,
        "results": results,
    }
    text = markdown(found)
    print(f"\n{text}")
    if not arguments.quick:
        report.write(HERE / "results", found, text, "optimizer_")


if __name__ == "__main__":
    main()
