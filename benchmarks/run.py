"""Times, compiles and weighs the pipeline beside a plain one-device loop of the same work; see README.md here.

Writes results/<platform>_<date>.json and .md, and prints the tables.
"""

import argparse
import functools
import os
import platform
import time
from pathlib import Path
from typing import Any

# XLA reads this once, so before JAX is imported: simulated devices on a busy machine may wait long for each other, and
# by default XLA takes that for a deadlock.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import jaxlib
import measure
import model
import report
from contestants import Contestant, Contestants

HERE = Path(__file__).parent


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of timing (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run? Prints only")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/ beside this script)")
    parser.add_argument(
        "--quote", type=Path, metavar="JSON", help="run nothing; quote this result in the documentation"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least one round is needed.")
    if arguments.quote is not None:
        report.quote(HERE.parent / "docs" / "explanations" / "when_not.md", arguments.quote)
        return
    jax.config.update("jax_num_cpu_devices", 4)  # means something only on a machine without accelerators
    measured = Benchmark(arguments.quick, 2 if arguments.quick else arguments.rounds).run()
    text = report.markdown(measured)
    print(f"\n{text}")
    folder = arguments.output or (None if arguments.quick else HERE / "results")
    if folder is not None:
        report.write(folder, measured, text)


class Benchmark:
    """One run."""

    def __init__(self, quick: bool, rounds: int):
        self.quick, self.rounds = quick, rounds
        self.size = model.Size(layers=4, width=32, length=16, rows=2) if quick else model.Size()
        self.few, self.many = 8, 64
        devices = jax.devices()
        self.simulated = devices[0].platform == "cpu"
        # One stage shows what the loop and its buffers cost; simulated devices make sense with two and four.
        self.stages = [s for s in ((2, 4) if self.simulated else (1, 2, 4)) if s <= len(devices)]
        self.make = Contestants(self.size, self.few)
        self.programs: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Everything, as the JSON holds it."""
        start = time.perf_counter()
        # The first trace of a process pays for caches that all later ones use.
        for first in (self.make.plain("layer"), self.make.pipeline(self.stages[0], "layer")):
            first.make(self.few).lower(first.params, *jax.device_put(self.make.batch, first.home))
        for remat in ["layer"] if self.quick else model.REMATS:
            pipelines = [self.make.pipeline(stages, remat) for stages in self.stages]
            self._compete("training step", [self.make.plain(remat), *pipelines])
        self._compete("evaluation", [self.make.plain_evaluation(), *map(self.make.evaluation, self.stages)])
        most = self.stages[-1]
        others = [self.make.pipeline(most, "layer", "gpipe"), self.make.autodiff(most)]
        self._compete(None, [self.make.plain("layer"), *others])
        device = jax.devices()[0]
        return {
            **measure.machine(),
            "device_kind": device.device_kind,
            "devices": len(jax.devices()),
            "simulated": self.simulated,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
            "quick": self.quick,
            "rounds": self.rounds,
            "model": vars(self.size),
            "micro_batches": self.few,
            "many_micro_batches": self.many,
            "times": self.times,
            "programs": self.programs,
            "seconds": time.perf_counter() - start,
        }

    def _compete(self, work: str | None, contestants: list[Contestant]) -> None:
        """Compiles all, checks that they agree with the first, and times them against it if `work` has a name."""
        runs: list[Any] = []
        wanted = None
        for contestant in contestants:
            function, batch = self._compile(contestant)
            runs.append(functools.partial(function, contestant.params, *batch))
            result = runs[-1]()  # the warm-up, too
            found = result if work == "evaluation" else (result[0], contestant.to_layers(result[1]))
            wanted = found if wanted is None else wanted
            measure.check_equal(found, wanted, _title(contestant))
        if work is None:
            return
        print(f"timing: {work}, remat {contestants[0].remat}", flush=True)
        plain, *seconds = measure.interleave(runs, self.rounds)
        for contestant, ours in zip(contestants[1:], seconds, strict=True):
            at = {"work": work, "remat": contestant.remat, "stages": contestant.stages}
            self.times.append({**at, "ratio": measure.ratio(ours, plain), "seconds": ours, "plain_seconds": plain})

    def _compile(self, contestant: Contestant) -> tuple[Any, Any]:
        """Describes the programs for few and (for one remat mode) for many micro-batches; returns the former."""
        batch = jax.device_put(self.make.batch, contestant.home)
        function = contestant.make(self.few)
        self._describe(contestant, self.few, function, batch)
        if contestant.remat in ("layer", "-"):
            many = [jax.ShapeDtypeStruct((self.many, *a.shape[1:]), a.dtype, sharding=a.sharding) for a in batch]
            self._describe(contestant, self.many, contestant.make(self.many), many)
        return function, batch

    def _describe(self, contestant: Contestant, count: int, function: Any, batch: Any) -> None:
        at = {"name": contestant.name, "remat": contestant.remat, "stages": contestant.stages, "micro_batches": count}
        if any(program.items() >= at.items() for program in self.programs):
            return
        print(f"compiling: {_title(contestant)}, M = {count}", flush=True)
        self.programs.append({**at, **measure.compile_and_describe(function, contestant.params, *batch)})


def _title(contestant: Contestant) -> str:
    return f"{contestant.name}, remat {contestant.remat}, S = {contestant.stages}"


if __name__ == "__main__":
    main()
