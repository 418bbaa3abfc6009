"""Seconds from the start of the demo to the end of its first step: the first time, and with what was compiled then.

    python benchmarks/first_step.py

Each start is a process of its own, which is ended after its first step. See docs/howto/start_sooner.md.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = Path(__file__).parents[1] / "examples" / "train_gpt.py"


def seconds(output: str) -> tuple[float, float]:
    """Of one start: those on the clock, and those of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    # One step: the progress bar prints its line when the device is done with it.
    command = [sys.executable, "-u", str(DEMO), "--steps", "1", "--output", output]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/1"):
                break
        else:
            raise SystemExit("The demo ended before its first step.")
        found = time.perf_counter() - start
        process.kill()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="pairs of starts (default: %(default)s)")
    rounds = parser.parse_args().rounds
    ratios: list[float] = []
    print(
        "| first start, s | second start, s | first / second | processor: first, s | second, s |\n|--:|--:|--:|--:|--:|"
    )
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as output:
            (first, busy_first), (second, busy_second) = seconds(output), seconds(output)
        ratios.append(first / second)
        print(f"| {first:.1f} | {second:.1f} | {ratios[-1]:.2f} | {busy_first:.1f} | {busy_second:.1f} |", flush=True)
    print(f"\nmedian of first / second: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
