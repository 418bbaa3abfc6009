"""Predicted steps of all schedules on a TPU that is not there, and what `simulate` says of them.

    .venv-tpu/bin/python benchmarks/schedules_tpu.py                        # in an environment with jaxpipe[tpu]
    .venv-tpu/bin/python benchmarks/schedules_tpu.py --only zero_bubble     # schedules whose names match

The GPT of `compilers.py` on v5e:2x4, four ranks and two data ranks; each rank has four of the 16 blocks under every
schedule, and the last stage has the head. A step of each schedule is compiled once, for M = 8. The cycles of its ops do not
depend on M, so steps of other M are walked through with the same ones. Writes results/schedules_tpu.json, in which
schedules that were not asked for stay as they are, and the tables in schedules_tpu.md. Each one has a process of its own.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "schedules_tpu.json"
TOPOLOGY, RANKS, DATA, BLOCKS = "v5e:2x4", 4, 2, 16
COMPILED, COUNTS = 8, (4, 8, 16, 32)
# Name, and stages per rank.
SCHEDULES = {
    "1f1b": 1,
    "eager_1f1b": 1,
    "gpipe": 1,
    "interleaved": 2,
    "looped_bfs": 2,
    "zero_bubble": 1,
    "interleaved_zero_bubble": 2,
    "zbv": 2,
}
SYNCS = ("none", "neighbour", "global")


def cuts(stages: int) -> list[int]:
    """The same number of blocks for each stage, the embedding in the first one, and the head in the last one."""
    return [0, *(1 + BLOCKS * stage // stages for stage in range(1, stages)), BLOCKS + 2]


def compile_case(name: str, remat: str) -> dict[str, Any]:
    """The figures of a schedule."""
    import jax.numpy as jnp
    import optax
    from gpt import Gpt

    import jaxpipe

    began, chunks = time.perf_counter(), SCHEDULES[name]
    gpt = Gpt(blocks=BLOCKS, dtype=jnp.float32)
    config = {"num_micro_batches": COMPILED, "schedule": name, "remat": remat, "compute_dtype": "bfloat16"}
    report = jaxpipe.compile(
        gpt.module(partition_method=cuts(RANKS * chunks)),
        optax.adam(1e-3),
        mesh=jaxpipe.make_mesh(pipe=RANKS, data=DATA, devices=jaxpipe.topology(TOPOLOGY)),
        example=gpt.example(DATA),
        config=config | ({"num_chunks": chunks} if name not in ("zbv",) else {}),
    )
    assert report.chip is not None and report.chip.clock is not None
    clock = report.chip.clock
    permutes = [one for one in report.collectives if one.kind == "collective-permute" and one.where.startswith("loop")]
    ops: dict[str, list[float]] = {}
    for cost in report.ops:
        times = ops.setdefault(cost.op.kind, [0.0] * (RANKS * chunks))
        for stage in cost.stages:
            times[stage] = cost.cycles / clock
    per_tick = report.cycles["loop"] / clock / report.ticks
    seen = sum(one.count * one.bytes / report.chip.link for one in permutes if not one.asynchronous)
    outside = report.times["optimizer"] + report.times["transfers"] - seen
    steps = {m: walked(name, chunks, m, ops, per_tick, seen / report.ticks, outside) for m in COUNTS}
    found = steps[COMPILED]["step"]
    assert report.step_seconds is not None
    assert abs(found / report.step_seconds - 1) < 0.01, f"{found} is not the {report.step_seconds} of the report"
    return {
        "ops": ops,
        "per_tick": per_tick,
        "outside": outside,
        "steps": steps,
        "step_of_the_report": report.step_seconds,
        "times": dict(report.times),
        "loop_overhead": report.loop_overhead,
        "permutes": [sum(one.count for one in permutes), sum(one.count for one in permutes if one.asynchronous)],
        "ticks": report.ticks,
        "bytes": dict(report.bytes_per_device),
        "planned": dict(report.planned),
        "instructions": report.text.count(" = "),
        "seconds_to_compile": round(time.perf_counter() - began, 1),
    }


def walked(
    name: str, chunks: int, m: int, ops: dict[str, list[float]], per_tick: float, permute: float, outside: float
) -> dict[str, float]:
    """The seconds of a step of m micro-batches, and those of its ticks as `simulate` has them."""
    from jaxpipe import schedules
    from jaxpipe.lowering.lower import lower
    from jaxpipe.lowering.pace import pace
    from jaxpipe.schedules.registry import CHUNKED

    more = {"num_chunks": chunks} if name in CHUNKED else {}
    table = schedules.get(name, RANKS * chunks, m, **more)
    total = pace(lower(table), lambda cell: ops[cell.kind][cell.stage], per_tick, permute).total
    first, second = (ops["I"], ops["W"]) if "I" in ops else (ops["B"], [0.0] * len(ops["B"]))
    said = {sync: float(schedules.simulate(table, ops["F"], first, second, sync=sync).makespan) for sync in SYNCS}
    return {"step": total + outside, "ticks": total, **said}


# --------------------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; the first column is aligned to the left."""
    lines = [head, ["-" * 3, *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [
        "# Schedules on a TPU that is not there",
        "[How this is made and read](../README.md#what-the-compilers-say). Predicted steps on v5e:2x4, pipe 4 x data 2: a "
        "GPT of 16 blocks of width 1024, sequences of 1024 tokens, 4 rows per data rank, computed in bfloat16, Adam.",
    ]
    for remat, found in results.items():
        parts.append(f'## remat="{remat}"')
        rows = []
        for name, own in found.items():
            steps = [f"{own['steps'][str(m)]['step']:.3f}" for m in COUNTS]
            parts_of = [
                f"{own['times'][part]:.3f}" for part in ("forward", "backward", "tail", "loop", "transfers", "waiting")
            ]
            asynchronous = f"{own['permutes'][1]} of {own['permutes'][0]}"
            memory = [f"{own['bytes']['total'] / 1e9:.2f}", f"{own['planned'].get('pending', 0) / 1e9:.2f}"]
            rows.append([name, *steps, *parts_of, f"{100 * own['loop_overhead']:.1f} %", asynchronous, *memory])
        parts.append("Seconds of a step, and of M = 8 where the rank that works longest spends them.")
        parts.append(
            table(
                [
                    "schedule",
                    *(f"M = {m}" for m in COUNTS),
                    *("forward", "backward", "tail", "loop", "transfers", "waiting", "loop overhead"),
                    *("permutes beside work", "GB in all", "GB between I and W"),
                ],
                rows,
            )
        )
        parts.append("What `simulate` says of the ticks of the same ops, by `sync`, as an error in percent.")
        rows = []
        for name, own in found.items():
            errors = {
                sync: [100 * (own["steps"][str(m)][sync] / own["steps"][str(m)]["ticks"] - 1) for m in COUNTS]
                for sync in SYNCS
            }
            rows.append([name, *(f"{error:+.1f}" for sync in ("none", "neighbour") for error in errors[sync])])
            rows[-1] += [f"{statistics.median(map(abs, errors[sync])):.1f}" for sync in SYNCS]
        head = ["schedule", *(f"{sync}, M = {m}" for sync in ("none", "neighbour") for m in COUNTS)]
        parts.append(table([*head, *(f"median of {sync}" for sync in SYNCS)], rows))
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------------ run


def run_case(name: str, remat: str) -> dict[str, Any] | None:
    """Compiles a schedule in a process of its own; None where the compiler or the figures fail."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_", "LIBTPU"))}
    command = [sys.executable, __file__, "--case", name, "--remat", remat]
    run = subprocess.run(command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if run.returncode != 0:
        print(name, "\n".join(run.stderr.strip().splitlines()[-3:]), flush=True)
        return None
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression; schedules whose names it matches as a whole")
    parser.add_argument("--remat", default="layer")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(compile_case(arguments.case, arguments.remat)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    own = results.setdefault(arguments.remat, {})
    for name in SCHEDULES:
        if re.fullmatch(arguments.only or ".*", name) and (found := run_case(name, arguments.remat)) is not None:
            own[name] = found
            print(name, f"{found['step_of_the_report']:.3f} s", flush=True)
            results[arguments.remat] = {known: own[known] for known in SCHEDULES if known in own}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(markdown(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
