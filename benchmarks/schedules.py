"""A training step of every schedule beside a plain one-device loop of the same work: time, memory, program.

Writes results/schedules_<platform>_<date>.json and .md, and prints the table. See README.md here.
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
import measure
import model
import report
from contestants import NAMES, Contestant, Contestants

HERE = Path(__file__).parent
# On simulated devices that share cores a step should take as long as the plain loop: idle time costs nothing there.
HEAD = ["schedule", "S", "step / plain loop", "plain, s", "temp MB / device", "beside 1F1B", "HLO lines", "permutes"]


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="schedules beside 1F1B")
    parser.add_argument("--remat", choices=model.REMATS, default="dots")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing, in turns; 0 only compiles and checks")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run? Prints only")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(arguments.ranks))
    size = model.Size(width=32, length=16, rows=2) if arguments.quick else model.Size()
    make = Contestants(size, few=8)
    rows: list[list[Any]] = []
    found: list[dict[str, Any]] = []
    for ranks in arguments.ranks:
        names = list(dict.fromkeys(["1f1b", *arguments.only]))
        chunks = {name: 1 + (name in ("interleaved", "looped_bfs", "interleaved_zero_bubble")) for name in names}
        pipelines = [make.pipeline(ranks, arguments.remat, name, chunks[name]) for name in names]
        for each in _compete(make, [make.plain(arguments.remat), *pipelines], arguments.rounds):
            found.append(each)
            beside = each["temp_bytes"] / next(o["temp_bytes"] for o in found if o["stages"] == ranks)
            time = report.spread(each["ratio"]) if each["ratio"] else "not timed"
            plain = f"{statistics.median(each['plain_seconds']):.3f}" if each["plain_seconds"] else "-"
            memory = f"{each['temp_bytes'] / 1e6:.1f}", f"{beside:.2f}"
            rows.append([each["name"], ranks, time, plain, *memory, each["hlo_lines"], each["permutes"]])
    machine = measure.machine()
    about = (
        f"Remat {arguments.remat}, M = {make.few}, {size.layers} layers of width {size.width}; schedules of several stages "
        f"per rank have 2. {machine['platform']}, {machine['cores']} cores, {machine['date']}, jax {machine['jax']}. "
        "Times are medians of ratios in turns with the plain loop on one device (least-greatest)."
    )
    text = f"# Schedules\n\n{about}\n\n{report.table(HEAD, rows)}\n"
    print(f"\n{text}")
    if not arguments.quick and arguments.rounds:
        report.write(HERE / "results", {**machine, "model": vars(size), "programs": found}, text, "schedules_")


def _compete(make: Contestants, contestants: list[Contestant], rounds: int) -> list[dict[str, Any]]:
    """Compiles all, checks that they agree with the first, and times them against it."""
    runs: list[Any] = []
    described: list[dict[str, Any]] = []
    wanted = None
    for contestant in contestants:
        print(f"compiling: {contestant.name}, S = {contestant.stages}", flush=True)
        batch = jax.device_put(make.batch, contestant.home)
        function = contestant.make(make.few)
        at = {"name": contestant.name, "remat": contestant.remat, "stages": contestant.stages}
        described.append({**at, **measure.compile_and_describe(function, contestant.params, *batch)})
        runs.append(functools.partial(function, contestant.params, *batch))
        loss, grads = runs[-1]()
        result = loss, contestant.to_layers(grads)
        wanted = result if wanted is None else wanted
        measure.check_equal(result, wanted, contestant.name)
    plain, *seconds = measure.interleave(runs, rounds) if rounds else [[] for _ in runs]
    return [
        {**each, "seconds": ours, "plain_seconds": plain, "ratio": measure.ratio(ours, plain) if rounds else None}
        for each, ours in zip(described[1:], seconds, strict=True)
    ]


if __name__ == "__main__":
    main()
