"""How long steps take whose layers sleep, schedule by schedule, and how long `simulate` says that they take.

    .venv/bin/python benchmarks/waits.py                   # about five minutes; the machine may be busy
    .venv/bin/python benchmarks/waits.py --quick           # a few steps; prints only

The rules about waiting are those of `simulate(sync=)`, and "joined" that of the planner, in which a permute joins two ranks
in the ticks in which it carries a value.

A layer that sleeps needs no core. So simulated devices keep to the schedule as devices of their own would, and what is
measured is what the compiled loop makes ranks wait for, and nothing else. All layers have the same costs. What a tick takes
beside its ops grows with what else the machine does, so the unit has to be much longer.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
from measure import machine

import jaxpipe
from jaxpipe import schedules
from jaxpipe.planner.tables import schedules as all_schedules
from jaxpipe.planner.walk import OpCosts, walk
from jaxpipe.schedules.simulate import SYNCS

HERE = Path(__file__).parent
RULES = (*SYNCS, "joined")


class Units(NamedTuple):
    """What the ops of one layer cost, in units."""

    forward: float
    backward_input: float
    backward_weight: float


def sleeper(units: Units, unit: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`layer(w, x)`, which multiplies, and sleeps: in the forward, for the gradient of x, and for that of w."""

    def sleep(seconds: float, x: jax.Array) -> jax.Array:
        def on_host(value: Any) -> np.ndarray:
            time.sleep(seconds)
            return np.asarray(value)

        first = (0,) * x.ndim
        return x.at[first].set(jax.pure_callback(on_host, jax.ShapeDtypeStruct((), x.dtype), x[first]))

    @jax.custom_vjp
    def layer(w: jax.Array, x: jax.Array) -> jax.Array:
        return sleep(units.forward * unit, w * x)

    def forward(w: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return layer(w, x), (w, x)

    def backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, x = kept
        return sleep(units.backward_weight * unit, x * dy).sum(), sleep(units.backward_input * unit, w * dy)

    layer.defvjp(forward, backward)
    return layer


def step(name: str, ranks: int, micro_batches: int, units: Units, unit: float) -> dict[str, Any]:
    """What is said and what is measured, in units."""
    chunks = all_schedules()[name][0]
    stages, asked = ranks * chunks, 1 if name == "zbv" else chunks
    apply = sleeper(units, unit)
    layers = [jaxpipe.Layer(init=lambda key, x: jnp.float32(1), apply=apply) for _ in range(stages)]
    module = jaxpipe.PipelineModule(layers, lambda y, t: jnp.mean((y - t) ** 2), partition_method="uniform")
    mesh = jaxpipe.make_mesh(pipe=ranks)
    pipe = jaxpipe.Pipeline(module, mesh, micro_batches, name, "none", num_chunks=asked)
    x = np.ones((micro_batches, 2, 4), np.float32)
    params = pipe.init(0, x[0])
    seconds: list[float] = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(pipe.value_and_grad(params, (x, x)))
        seconds.append(time.perf_counter() - start)
    table = schedules.get(name, stages, micro_batches, chunks)
    # Nobody wants the gradient of the inputs of the first stage.
    costs = [units[0]] * stages, [0.0, *[units[1]] * (stages - 1)], [units[2]] * stages
    said = {sync: float(schedules.simulate(table, *costs, sync=sync).makespan) for sync in SYNCS}
    said["joined"] = float(walk(name, ranks, chunks, micro_batches, OpCosts(*map(np.array, costs))).makespan)
    return {
        "schedule": name,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "units": units,
        "measured": statistics.median(seconds[1:]) / unit,  # the first one compiles
        "said": said,
    }


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """A table of all steps, and the median error of each schedule and rule."""
    rows = [
        [
            *(one[key] for key in ("schedule", "ranks", "micro_batches")),
            " ".join(f"{cost:g}" for cost in one["units"]),
            f"{one['measured']:.1f}",
            *(f"{one['said'][sync]:g} ({_error(one, sync):+.1f} %)" for sync in RULES),
        ]
        for one in found
    ]
    head = ["schedule", "S", "M", "F I W", "measured", *RULES]
    names = [*dict.fromkeys(one["schedule"] for one in found), "all"]
    medians = [
        [name, *(f"{_median([o for o in found if name in (o['schedule'], 'all')], sync):.1f} %" for sync in RULES)]
        for name in names
    ]
    return f"{report.table(head, rows)}\n\nMedian errors:\n\n{report.table(['schedule', *RULES], medians)}"


def _error(one: dict[str, Any], sync: str) -> float:
    return 100 * (one["said"][sync] / one["measured"] - 1)


def _median(found: Sequence[dict[str, Any]], sync: str) -> float:
    return statistics.median(abs(_error(one, sync)) for one in found)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps; prints only")
    parser.add_argument("--unit", type=float, default=0.06, metavar="SECONDS")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)
    cases = (
        [(2, 4, Units(1, 1, 1))]
        if arguments.quick
        else [
            (2, 8, Units(1, 1, 1)),
            (4, 4, Units(1, 1, 1)),
            (4, 8, Units(1, 1, 1)),
            (4, 8, Units(1, 1.5, 0.8)),
        ]
    )
    found: list[dict[str, Any]] = []
    for ranks, micro_batches, units in cases:
        for name in all_schedules():
            found.append(step(name, ranks, micro_batches, units, arguments.unit))
            print(found[-1], flush=True)
    about = machine()
    text = (
        "# Steps whose layers sleep\n\n"
        f"In units of {arguments.unit:g} s. What is said in brackets: how far it is from what was measured. "
        f"{about['cores']} cores, {about['date']}, jax {about['jax']}.\n\n{markdown(found)}\n"
    )
    print(text)
    if not arguments.quick:
        path = HERE / "results" / f"waits_{datetime.date.today().isoformat()}"
        path.with_suffix(".json").write_text(json.dumps({"about": about, "steps": found}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
