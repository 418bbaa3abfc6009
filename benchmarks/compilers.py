"""What the TPU and the GPU compiler say of training steps: bytes, collectives, copies, cycles, and a predicted time.

    .venv-tpu/bin/python benchmarks/compilers.py --label after              # in an environment with jaxpipe[tpu]
    .venv-cuda/bin/python benchmarks/compilers.py --label after             # the same with jaxpipe[cuda]
    .venv-tpu/bin/python benchmarks/compilers.py --label after --only 7B    # cases whose names match

Writes results/compilers.json, in which other labels and other cases stay as they are, and the tables in compilers.md.
Nothing runs on a TPU or a GPU, and the figures do not depend on the machine. Each case has a process of its own.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compilers.json"
COMPILERS = {"v": "libtpu", "h": "jax_plugins"}  # by the first letter of a topology
MEGABYTE = 10**6
# Products are cut by columns, then by rows, so that one sum over `model` follows each pair.
TENSOR = [("qkv", (None, "model")), ("up", (None, "model")), ("out", ("model", None)), ("down", ("model", None))]


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
      topology, mesh: where.
      gpt: fields of `gpt.Gpt`; the dtype of the weights is float32.
      config: of the step.
      cut: whether blocks are cut over the axis "model".
      evaluation: an evaluation instead of a training step.
    """

    topology: str
    mesh: dict[str, int]
    gpt: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    cut: bool = False
    evaluation: bool = False


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    mesh, low = {"pipe": 4, "data": 2}, {"compute_dtype": "bfloat16"}
    for topology in ("v5e:2x4", "h100:8"):
        for schedule in ("1f1b", "eager_1f1b", "gpipe"):
            config = {"num_micro_batches": 16, "schedule": schedule} | low
            found[f"{topology} {schedule}"] = Case(topology, mesh, config=config)
        for name, more in (("dots", {"remat": "dots"}), ("zero 1", {"zero_stage": 1})):
            found[f"{topology} 1f1b {name}"] = Case(topology, mesh, config={"num_micro_batches": 16} | low | more)
        found[f"{topology} 1f1b float32"] = Case(topology, mesh, config={"num_micro_batches": 16})
        found[f"{topology} evaluation"] = Case(topology, mesh, config={"num_micro_batches": 16} | low, evaluation=True)
    seven = {"blocks": 32, "width": 4096, "heads": 32, "length": 2048, "rows": 1}
    large = {"num_micro_batches": 32, "zero_stage": 1} | low
    found["v5p:4x4x4 7B pipe 8 x data 8"] = Case("v5p:4x4x4", {"pipe": 8, "data": 8}, seven, large)
    cube = {"pipe": 4, "data": 4, "model": 4}
    found["v5p:4x4x4 7B pipe 4 x data 4 x model 4"] = Case("v5p:4x4x4", cube, seven, large, cut=True)
    seventy = {"blocks": 80, "width": 8192, "heads": 64, "length": 4096, "rows": 1, "vocabulary": 128_256}
    wide = {"pipe": 8, "data": 16, "model": 4}
    found["v5p:8x8x8 70B pipe 8 x data 16 x model 4"] = Case("v5p:8x8x8", wide, seventy, large, cut=True)
    return found


CASES = _cases()


def compile_case(name: str) -> dict[str, Any]:
    """The figures of a case."""
    import jax.numpy as jnp
    import optax
    from gpt import Gpt

    import jaxpipe

    case, began = CASES[name], time.perf_counter()
    options: dict[str, Any] = {}
    if case.cut:
        from jax.sharding import PartitionSpec

        options["sharding"] = [(path, PartitionSpec(*spec)) for path, spec in TENSOR]
    config = dict(case.config)
    try:
        jaxpipe.Config(**config)
        gpt = Gpt(**case.gpt, dtype=jnp.float32, by_head=case.cut)
    except jaxpipe.errors.ConfigError:  # a version without mixed precision: weights in bfloat16 come nearest
        config.pop("compute_dtype", None)
        gpt = Gpt(**case.gpt, dtype=jnp.bfloat16, by_head=case.cut)
    report = jaxpipe.compile(
        gpt.module(**options),
        optax.adam(1e-3),
        mesh=jaxpipe.make_mesh(**case.mesh, devices=jaxpipe.topology(case.topology)),
        example=gpt.example(case.mesh["data"]),
        config=config,
        evaluation=case.evaluation,
    )
    return {
        "device": report.device,
        "bytes": dict(report.bytes_per_device),
        "planned": dict(report.planned),
        "flops": report.flops,
        "useful_flops": report.useful_flops,
        "collectives": [list(one) for one in report.collectives],
        "copies": [list(copy) for copy in report.copies if copy.bytes > MEGABYTE],
        "cycles": dict(report.cycles),
        "ops": [[*cost.op, list(cost.stages), *cost[2:]] for cost in report.ops],
        "seconds": dict(report.times),
        "utilisation": report.utilisation,
        "loop_overhead": report.loop_overhead,
        "seconds_to_compile": round(time.perf_counter() - began, 1),
    }


# --------------------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; the first column is aligned to the left."""
    lines = [head, ["-" * 3, *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(results: dict[str, Any]) -> str:
    """The tables of all labels."""
    parts = ["# What the compilers say\n\n[How this is made and read](../README.md#what-the-compilers-say)."]
    for label, found in results.items():
        cases = {name: figures for name, figures in found["cases"].items() if "bytes" in figures}
        failed = {name: figures["error"] for name, figures in found["cases"].items() if "error" in figures}
        parts.append(f"## {label}\n\n{found['about']}")
        parts.append(_memory(cases))
        parts.append(_loop(cases))
        timed = {name: figures for name, figures in cases.items() if figures["seconds"]}
        if timed:
            parts.append(_time(timed))
        parts += [f"{name}: {error}" for name, error in failed.items()]
    return "\n\n".join(parts) + "\n"


def _mb(size: float) -> str:
    return f"{size / MEGABYTE:,.0f}"


def _memory(cases: dict[str, Any]) -> str:
    kinds = ["weights", "optimizer", "gradients", "saved", "temporary", "total"]
    rows = [[name, *(_mb(figures["bytes"][kind]) for kind in kinds)] for name, figures in cases.items()]
    return table(["MB on a device", *kinds], rows)


def _loop(cases: dict[str, Any]) -> str:
    rows = []
    for name, figures in cases.items():
        permutes = [c for c in figures["collectives"] if c[0] == "collective-permute" and c[4].startswith("loop")]
        other = [c for c in figures["collectives"] if c not in permutes and not c[4].startswith("outside")]
        state = [copy for copy in figures["copies"] if copy[0] not in ("message", "other")]
        beside, count = sum(c[2] for c in permutes if c[3]), sum(c[2] for c in permutes)
        overhead = figures["loop_overhead"]
        rows.append(
            [
                name,
                f"{beside} of {count}",
                str(sum(c[2] for c in other)),
                f"{len(figures['copies'])}, {_mb(sum(copy[2] for copy in figures['copies']))}",
                f"{len(state)}, {_mb(sum(copy[2] for copy in state))}",
                "" if overhead is None else f"{100 * overhead:.1f} %",
            ]
        )
    head = ["in the ticks", "permutes with work beside", "other collectives", "sorts of copies above 1 MB, MB"]
    return table([*head, "of them weights, gradients, saved values", "loop overhead"], rows)


def _time(cases: dict[str, Any]) -> str:
    parts = ["forward", "backward", "tail", "loop", "transfers", "optimizer", "waiting"]
    rows = [
        [
            name,
            *(f"{figures['seconds'][part]:.3f}" for part in parts),
            f"{sum(figures['seconds'].values()):.3f}",
            f"{100 * figures['utilisation']:.1f} %",
        ]
        for name, figures in cases.items()
    ]
    return table(["seconds on the rank that works longest", *parts, "step", "utilisation"], rows)


# ------------------------------------------------------------------------------------------------------------------ run


def run_case(name: str) -> dict[str, Any]:
    """Compiles a case in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_", "LIBTPU"))}
    command = [sys.executable, __file__, "--case", name]
    run = subprocess.run(command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if run.returncode != 0:
        return {"error": run.stderr.strip().splitlines()[-1][:500]}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="now", help="the heading under which the figures stand")
    parser.add_argument("--about", default="", help="a sentence below that heading")
    parser.add_argument("--only", default="", help="a regular expression; cases whose names it matches")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(compile_case(arguments.case)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    own = results.setdefault(arguments.label, {"about": "", "cases": {}})
    own["about"] = arguments.about or own["about"] or f"{datetime.date.today().isoformat()}"
    for name, case in CASES.items():
        installed = importlib.util.find_spec(COMPILERS[case.topology[0]]) is not None
        if installed and re.search(arguments.only, name):
            own["cases"][name] = run_case(name)
            print(name, own["cases"][name].get("error", "done"), flush=True)
            own["cases"] = {known: own["cases"][known] for known in CASES if known in own["cases"]}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
