"""How long `simulate` and the planner say that steps take, and how long they take, schedule by schedule.

    .venv/bin/python benchmarks/simulated.py               # on a quiet machine with two cores
    .venv/bin/python benchmarks/simulated.py --quick       # tiny: does the script work?

Simulated devices share the cores of the machine, so a bubble is only there if each rank has a core of its own: two ranks,
two cores, and one thread per device. XLA is told so. With more ranks than cores a rank that waits leaves its core to the
others, and steps of all schedules take equally long.

The cost of each op is measured by itself, on both devices at once, so that the cores have to share caches and memory as
they do in a step. How a backward splits into I and W is told from their operations. Then the tables are simulated with
these costs, once for each rule about waiting: "joined" is that of the planner, in which a permute joins two ranks in the
ticks in which it carries a value. Steps are timed in turns. What a step does around its ticks and between its ops is in no
prediction. With --quick the numbers mean nothing.
"""

import argparse
import datetime
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from measure import interleave, machine
from model import Size, make_module

import jaxpipe
from jaxpipe.columns import columns
from jaxpipe.hardware.chips import as_chip
from jaxpipe.model.precision import NO_CASTS
from jaxpipe.planner import tables
from jaxpipe.planner.candidate import Candidate, Mesh
from jaxpipe.planner.cost import Costs
from jaxpipe.planner.measured import Timed
from jaxpipe.planner.step import Steps
from jaxpipe.planner.trace import Model
from jaxpipe.planner.walk import walk
from jaxpipe.schedules.simulate import SYNCS, simulate

RANKS = 2
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
RULES = (*SYNCS, "joined")


class Case(NamedTuple):
    """One step: the schedule, its micro-batches, and what is predicted for it, in seconds by rule."""

    schedule: str
    micro_batches: int
    predicted: dict[str, float]
    run: Any


def predictor(size: Size) -> Steps:
    """What knows the costs of the layers, each measured once, on all devices at once."""
    rows = jax.ShapeDtypeStruct(size.micro_batch, jnp.float32)
    model = Model(make_module(size), (rows, rows), jaxpipe.make_mesh(pipe=RANKS), NO_CASTS)
    free = {"peak_flops": 1e30, "memory": 1e15, "bandwidth": 1e30, "link": 1e30}  # nothing but what is measured
    return Steps(Costs(model, as_chip(free), Timed(model)))


def case(steps: Steps, size: Size, schedule: str, micro_batches: int, remat: str) -> Case:
    """A step, compiled, and its predictions."""
    chunks = tables.schedules()[schedule][0]
    candidate = Candidate(Mesh(RANKS, 1), schedule, chunks, micro_batches, size.rows, remat, 0)
    boundaries, stages = steps.cut(candidate)
    table = tables.make(schedule, RANKS, chunks, micro_batches)
    forward, first, second = ([float(seconds) for seconds in part] for part in stages.ops)
    predicted = {sync: float(simulate(table, forward, first, second, sync=sync).makespan) for sync in SYNCS}
    predicted["joined"] = walk(schedule, RANKS, chunks, micro_batches, stages.ops).makespan

    module = make_module(size)
    module.partition_method = list(boundaries)
    asked = chunks if schedule in tables.CHUNKED else 1
    mesh = jaxpipe.make_mesh(pipe=RANKS)
    pipe = jaxpipe.Pipeline(module, mesh, micro_batches, schedule, remat, num_chunks=asked)
    keys = jax.random.split(jax.random.key(1), 2)
    batch = tuple(jax.random.normal(key, (micro_batches, *size.micro_batch)) for key in keys)
    params = pipe.init(0, batch[0][0])
    step = jax.jit(pipe.value_and_grad)
    jax.block_until_ready(step(params, batch))
    return Case(schedule, micro_batches, predicted, lambda: step(params, batch))


def measure(size: Size, counts: list[int], remats: list[str], rounds: int) -> list[dict[str, Any]]:
    """The figures of all cases."""
    steps, found = predictor(size), list[dict[str, Any]]()
    for remat in remats:
        cases = [case(steps, size, name, m, remat) for m in counts for name in tables.schedules()]
        for one, seconds in zip(cases, interleave([one.run for one in cases], rounds), strict=True):
            took = statistics.median(seconds)
            errors = {rule: predicted / took - 1 for rule, predicted in one.predicted.items()}
            names = {"schedule": one.schedule, "micro_batches": one.micro_batches, "remat": remat}
            found.append(names | {"seconds": took, "predicted": one.predicted, "errors": errors})
    return found


def report(found: list[dict[str, Any]]) -> str:
    """A table of all steps, and one of the errors of each schedule."""
    rows = [["remat", "schedule", "M", "measured", *(f"{rule}, error" for rule in RULES)]]
    for one in found:
        errors = [f"{one['predicted'][rule]:.4f} {100 * one['errors'][rule]:+.1f} %" for rule in RULES]
        rows.append([one["remat"], one["schedule"], str(one["micro_batches"]), f"{one['seconds']:.4f}", *errors])
    medians = [["median error", *RULES]]
    for name in dict.fromkeys(one["schedule"] for one in found):
        own = [one for one in found if one["schedule"] == name]
        medians.append([name, *(f"{_median(own, rule):.1f} %" for rule in RULES)])
    medians.append(["all", *(f"{_median(found, rule):.1f} %" for rule in RULES)])
    return "\n".join([*columns(rows, left={0, 1}), "", *columns(medians, left={0})])


def _median(found: list[dict[str, Any]], rule: str) -> float:
    return 100 * statistics.median(abs(one["errors"][rule]) for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once; writes nothing")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16], metavar="M")
    arguments = parser.parse_args()
    # XLA reads this when the first device is asked for.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    jax.config.update("jax_num_cpu_devices", RANKS)
    about = machine()
    if about["cores"] < RANKS:
        raise SystemExit(f"{RANKS} ranks need {RANKS} cores, and there is {about['cores']}: nothing could be compared.")
    if arguments.quick:
        found = measure(Size(layers=4, width=16, heads=2, length=8, rows=2), [4], ["layer"], 1)
    else:
        found = measure(Size(), arguments.micro_batches, ["layer", "dots"], arguments.rounds)
    print(report(found))
    if not arguments.quick:
        path = Path(__file__).parent / "results" / f"simulated_{about['platform']}_{datetime.date.today().isoformat()}"
        path.with_suffix(".json").write_text(json.dumps({"about": about, "steps": found}, indent=1) + "\n")
        path.with_suffix(".md").write_text(f"# Predicted and measured steps\n\n```text\n{report(found)}\n```\n")


if __name__ == "__main__":
    main()
