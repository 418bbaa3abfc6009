"""Saves and loads a training state with one process and with several: seconds, bytes, memory of each process.

The same four devices are held by 1, 2 and 4 processes. Writes results/checkpoints_together_<platform>_<date>.json and .md,
and prints the table.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jaxpipe

if __name__ == "__main__" and "--work" in sys.argv:
    jaxpipe.start()

import checkpoints
import jax
import jax.numpy as jnp
import optax
import report

HERE = Path(__file__).parent
DEVICES, LAYERS = 4, 8
WORK = ("save", "save, in the background", "load")


def make_engine(width: int, layers: int) -> jaxpipe.Engine:
    """Like layers of two matrices between two others, which are stored once and cut over the ranks; Adam."""

    def init(key: jax.Array, _: Any) -> dict[str, jax.Array]:
        return {
            name: jax.random.normal(each, (width, width))
            for name, each in zip("ab", jax.random.split(key), strict=True)
        }

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["a"] @ params["b"]

    def other(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["a"] + x @ params["b"]

    def last(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["a"] - x @ params["b"]

    list_of = [jaxpipe.Layer(init, other, "First"), *[jaxpipe.Layer(init, apply, "Layer")] * layers]
    module = jaxpipe.PipelineModule([*list_of, jaxpipe.Layer(init, last, "Last")], lambda y, t: y.mean())
    example = jax.ShapeDtypeStruct((4, width), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    return jaxpipe.initialize(module, optax.adam(1e-3), mesh=jaxpipe.make_mesh(pipe=DEVICES), example=example)


def one_process(work: str, folder: Path, rounds: int, width: int) -> dict[str, Any]:
    """What one process measures of one kind of work: memory in the first round, seconds in the others."""
    small, large = make_engine(8, LAYERS), make_engine(width, LAYERS)

    def run(engine: jaxpipe.Engine, tag: str) -> None:
        if work == "load":
            engine.load_checkpoint(folder, tag)
        else:
            engine.save_checkpoint(folder, tag, blocking=work == "save")
            engine.wait_for_checkpoint()

    small.save_checkpoint(folder, "small")  # imports, threads and buffers of fixed size
    run(small, "small")
    jax.block_until_ready(large.state)
    with checkpoints.Memory() as memory:
        run(large, "large")
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(large, "large")
        seconds.append(time.perf_counter() - start)
    leaves = jax.tree.leaves((large.state.params, large.state.opt_state))
    own = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    stored = sum(path.stat().st_size for path in (folder / "large").rglob("*") if path.is_file())
    return {"seconds": seconds, "memory": memory.more, "own_bytes": own, "bytes": stored}


def launched(processes: int, work: str, rounds: int, width: int, folder: str | None) -> list[dict[str, Any]]:
    """What each process measures."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        if work == "load":  # in other processes, whose heaps have no room that a save has left
            _launch(processes, "save", 0, width, place)
        return _launch(processes, work, rounds, width, place)


def _launch(processes: int, work: str, rounds: int, width: int, place: str) -> list[dict[str, Any]]:
    launch = ["launch", "-n", str(processes), "--devices-per-process", str(DEVICES // processes)]
    options = ["--work", work, "--folder", place, "--rounds", str(rounds), "--width", str(width)]
    command = [sys.executable, "-m", "jaxpipe", *launch, __file__, *options]
    # What is freed is given back to the system at once, so that what is counted is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [json.loads(line.partition("found ")[2]) for line in done.stdout.splitlines() if "] found " in line]


def markdown(found: dict[str, Any]) -> str:
    """The table of one run."""
    rows = []
    for case in found["cases"]:
        each = case["processes"]
        seconds = max(statistics.median(one["seconds"]) for one in each)
        more = max(one["memory"] for one in each) / found["layer_bytes"]
        beyond = max(one["memory"] - one["own_bytes"] for one in each) / found["layer_bytes"]
        rows.append([case["work"], str(len(each)), f"{seconds:.2f}", f"{each[0]['own_bytes'] / 1e6:.0f}"])
        rows[-1] += [f"{more:.2f}", f"{max(beyond, 0):.2f}" if case["work"] != "save" else f"{more:.2f}"]
    head = ["work", "processes", "seconds, the slowest process", "own state, MB", "memory on top, in layers"]
    head += ["without one copy of the own state"]
    return (
        f"# Checkpoints of several processes, {found['platform']}, {found['date']}\n\n"
        f"{LAYERS + 2} layers of {found['layer_bytes'] / 1e6:.1f} MB with Adam, two of them stored once and cut over the "
        f"ranks, on {DEVICES} simulated devices; {found['cores']} cores; jax {found['jax']}; {found['rounds']} rounds; "
        f"{found['bytes'] / 1e6:,.1f} MB on the disk. [How to read this](../README.md).\n\n{report.table(head, rows)}\n"
    )


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed (default: %(default)s)")
    parser.add_argument("--folder", help="on the disk to measure (default: a temporary folder)")
    parser.add_argument("--width", type=int, default=1536, help="of the layers (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny layers, one round: does it run? Prints only")
    parser.add_argument("--work", choices=WORK, help="what a process measures that this script has launched")
    arguments = parser.parse_args()
    if arguments.work:
        found = one_process(arguments.work, Path(arguments.folder), arguments.rounds, arguments.width)
        print("found " + json.dumps(found), flush=True)
        return
    width, rounds = (16, 1) if arguments.quick else (arguments.width, arguments.rounds)
    cases = []
    for work in WORK:
        for processes in (1, 2, 4):
            print(f"{work}, {processes} processes", flush=True)
            cases.append({"work": work, "processes": launched(processes, work, rounds, width, arguments.folder)})
    found = {
        "date": datetime.date.today().isoformat(),
        "platform": "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "rounds": rounds,
        "layer_bytes": 6 * width * width * 4,
        "bytes": cases[0]["processes"][0]["bytes"],
        "cases": cases,
    }
    text = markdown(found)
    print(f"\n{text}")
    if not arguments.quick:
        report.write(HERE / "results", found, text, "checkpoints_together_")


if __name__ == "__main__":
    main()
