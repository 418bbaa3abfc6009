"""1F1B beside GPipe by autodiff and a plain one-device loop, for more and more micro-batches; see README.md here.

Writes results/micro_batches_<platform>_<date>.json and .md, and prints the table.
"""

import argparse
import functools
import os
import statistics
import time
from pathlib import Path
from typing import Any

# XLA reads this once, so before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import measure
import model
import report
from contestants import Contestant, Contestants

HERE = Path(__file__).parent
COUNTS = (4, 8, 16, 32, 64)
REMAT = "layer"  # the only one that GPipe by autodiff has here
HEAD = ["program", "S", "M", "step / plain loop", "ms per micro-batch", "temp MB / device", "HLO lines", "compile, s"]


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="numbers of micro-batches")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing, in turns (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run? Prints only")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least one round is needed.")
    jax.config.update("jax_num_cpu_devices", max(arguments.ranks))
    size = model.Size(layers=4, width=32, length=16, rows=2) if arguments.quick else model.Size()
    start = time.perf_counter()
    found = [
        each
        for count in arguments.counts
        for each in _compete(size, count, arguments.ranks, 2 if arguments.quick else arguments.rounds)
    ]
    machine = measure.machine()
    about = (
        f"Remat {REMAT}, {size.layers} layers, width {size.width}, {size.rows} rows a micro-batch. {machine['platform']}, "
        f"{machine['cores']} cores, {machine['date']}, jax {machine['jax']}. Times are medians (least-greatest), in turns."
    )
    text = f"# Micro-batches\n\n{about}\n\n{report.table(HEAD, [_row(each) for each in found])}\n"
    print(f"\n{text}\n{time.perf_counter() - start:.0f} s")
    if not arguments.quick:
        report.write(HERE / "results", {**machine, "model": vars(size), "programs": found}, text, "micro_batches_")


def _compete(size: model.Size, count: int, ranks: list[int], rounds: int) -> list[dict[str, Any]]:
    """All contestants at M = count, checked against the plain loop and timed in turns with it."""
    make = Contestants(size, few=count)
    contestants: list[Contestant] = [make.plain(REMAT)]
    for stages in ranks:
        contestants += [make.pipeline(stages, REMAT), make.autodiff(stages)]
    runs: list[Any] = []
    described: list[dict[str, Any]] = []
    wanted = None
    for contestant in contestants:
        print(f"compiling: {contestant.name}, S = {contestant.stages}, M = {count}", flush=True)
        batch, function = jax.device_put(make.batch, contestant.home), contestant.make(count)
        at = {"name": contestant.name, "stages": contestant.stages, "micro_batches": count}
        described.append({**at, **measure.compile_and_describe(function, contestant.params, *batch)})
        runs.append(functools.partial(function, contestant.params, *batch))
        loss, grads = runs[-1]()
        result = loss, contestant.to_layers(grads)
        wanted = result if wanted is None else wanted
        measure.check_equal(result, wanted, f"{contestant.name}, M = {count}")
    seconds = measure.interleave(runs, rounds)
    return [
        {**each, "seconds": ours, "ratio": measure.ratio(ours, seconds[0])}
        for each, ours in zip(described, seconds, strict=True)
    ]


def _row(each: dict[str, Any]) -> list[Any]:
    count = each["micro_batches"]
    compiling = each["trace_seconds"] + each["lower_seconds"] + each["xla_seconds"]
    time_of_one = 1000 * statistics.median(each["seconds"]) / count
    of_program = f"{each['temp_bytes'] / 1e6:.1f}", each["hlo_lines"], f"{compiling:.1f}"
    return [each["name"], each["stages"], count, report.spread(each["ratio"]), f"{time_of_one:.1f}", *of_program]


if __name__ == "__main__":
    main()
