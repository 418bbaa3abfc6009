"""Saves and loads a training state with jaxpipe and with plain Orbax, side by side: seconds, bytes, memory.

Writes results/checkpoints_<platform>_<date>.json and .md, and prints the table.
"""

import argparse
import datetime
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import measure
import model
import numpy as np
import optax
import orbax.checkpoint as ocp
import report

import jaxpipe

HERE = Path(__file__).parent
PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """The most memory of this process while the `with` block runs, beyond what it had before, in bytes."""

    def __enter__(self) -> "Memory":
        self.more, self._stop, self._start = 0, threading.Event(), _resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self.more = max(self.more, _resident() - self._start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def make_engine(size: model.Size, stages: int) -> jaxpipe.Engine:
    """One with Adam, two steps in: fresh moments are zeros, which compress as trained ones do not."""
    example = tuple(jax.ShapeDtypeStruct(size.micro_batch, np.float32) for _ in range(2))
    module, mesh = model.make_module(size), jaxpipe.make_mesh(pipe=stages)
    engine = jaxpipe.initialize(module, optax.adam(1e-4), mesh=mesh, example=example)
    data = zip(*model.make_batch(size, 2), strict=True)
    for _ in range(2):
        engine.train_batch(data)
    return jax.block_until_ready(engine.state) and engine


def plain_orbax(engine: jaxpipe.Engine) -> tuple[Callable[[Path], None], Callable[[Path], Any]]:
    """The whole state as one tree, as a training script without layers would do it: (save, load)."""
    state = engine.state
    tree = {"params": state.params, "opt_state": state.opt_state, "step": state.step}
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
    checkpointer = ocp.StandardCheckpointer()

    def save(path: Path) -> None:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()

    return save, lambda path: jax.block_until_ready(checkpointer.restore(path, target))


def works(size: model.Size, stages: int, folder: Path) -> tuple[jaxpipe.Engine, dict[str, Callable[[str], Any]]]:
    """What is measured, each a function of a tag; those that load need one that was saved."""
    engine, other = make_engine(size, stages), make_engine(size, 1)
    return engine, {
        "save": lambda tag: engine.save_checkpoint(folder / "ours", tag),
        "save, in the background": lambda tag: engine.save_checkpoint(folder / "ours", f"{tag}b", blocking=False),
        "save, plain Orbax": lambda tag: plain_orbax(engine)[0](folder / "plain" / tag),
        "load": lambda tag: engine.load_checkpoint(folder / "ours", tag),
        "load at one stage": lambda tag: other.load_checkpoint(folder / "ours", tag),
        "load, plain Orbax": lambda tag: plain_orbax(engine)[1](folder / "plain" / tag),
    }


def run(size: model.Size, stages: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Everything, as the JSON holds it."""
    engine, work = works(size, stages, folder)
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves((engine.state.params, engine.state.opt_state))) / size.layers
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "until_done": []} for name in work}
    sizes: dict[str, int] = {}
    for number in range(-1, rounds):  # the first one warms up, and does not count
        print(f"round {number}", flush=True)
        for name, call in work.items():
            os.sync()
            start = time.perf_counter()
            result = call(f"round{number}")
            seconds = time.perf_counter() - start
            engine.wait_for_checkpoint()
            until_done = time.perf_counter() - start
            del result
            if number >= 0:
                found[name]["seconds"].append(seconds)
                found[name]["until_done"].append(until_done)
        sizes = {kind: _size(folder / kind / f"round{number}") for kind in ("ours", "plain")}
        for kind in sizes:
            shutil.rmtree(folder / kind)
    return {
        "date": datetime.date.today().isoformat(),
        "platform": jax.devices()[0].platform,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "orbax": importlib.metadata.version("orbax-checkpoint"),
        "rounds": rounds,
        "model": vars(size),
        "stages": stages,
        "layer_bytes": layer,
        "state_bytes": layer * size.layers,
        "bytes": sizes,
        "work": found,
    }


def memory_of(name: str, size: model.Size, stages: int, folder: Path) -> int:
    """The memory that one kind of work takes on top; for a process of its own, whose heap has no free room yet."""
    engine, work = works(size, stages, folder)
    tiny, _ = works(model.Size(2, 8, 1, 4, 1), 2, folder / "tiny")
    tiny.save_checkpoint(folder / "tiny")  # imports, threads and buffers of fixed size
    tiny.load_checkpoint(folder / "tiny")
    if name.startswith("load"):
        work["save"]("a")
        work["save, plain Orbax"]("a")
    with Memory() as memory:
        work[name]("a")
        engine.wait_for_checkpoint()
    return memory.more


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def markdown(found: dict[str, Any]) -> str:
    """The tables of one run."""
    size = found["model"]

    def ratio(name: str, other: str) -> str:
        return report.spread(measure.ratio(found["work"][name]["until_done"], found["work"][other]["until_done"]))

    rows = []
    for name, work in found["work"].items():
        rows.append(
            [
                name,
                f"{statistics.median(work['seconds']):.2f}",
                f"{statistics.median(work['until_done']):.2f}",
                ratio(name, f"{name.split()[0].rstrip(',')}, plain Orbax"),
                f"{work['memory_bytes'] / found['layer_bytes']:.2f}",
            ]
        )
    head = ["work", "returns after, s", "done after, s", "done / plain Orbax: median (min-max)"]
    head += ["memory on top, in layers"]
    places = {"state in memory": found["state_bytes"], "jaxpipe": found["bytes"]["ours"]}
    places["plain Orbax"] = found["bytes"]["plain"]
    sizes = [[place, f"{count / 1e6:,.1f}"] for place, count in places.items()]
    return (
        f"# Checkpoints, {found['platform']}, {found['date']}\n\n"
        f"{size['layers']} layers of width {size['width']} with Adam, {found['layer_bytes'] / 1e6:.1f} MB each, "
        f"{found['state_bytes'] / 1e6:.0f} MB in all, on {found['stages']} simulated devices; {found['cores']} cores; jax "
        f"{found['jax']}, Orbax {found['orbax']}; {found['rounds']} rounds. [How to read this](../README.md).\n\n"
        f"{report.table(head, rows)}\n\n"
        f"{report.table(['where', 'MB'], sizes)}\n"
    )


def main() -> None:
    """Runs everything; wants a machine that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run? Prints only")
    parser.add_argument("--memory-of", metavar="WORK", help="print the bytes that one kind of work takes on top")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)
    size = model.Size(layers=4, width=32, length=8, rows=1) if arguments.quick else model.Size(8, 1024, 8, 8, 1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.memory_of:
            print(memory_of(arguments.memory_of, size, 4, Path(folder)))
            return
        found = run(size, 4, 2 if arguments.quick else arguments.rounds, Path(folder))
    for name, work in found["work"].items():
        print(f"memory: {name}", flush=True)
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--memory-of", name], capture_output=True, check=True
        )
        work["memory_bytes"] = int(done.stdout)
    text = markdown(found)
    print(f"\n{text}")
    if not arguments.quick:
        report.write(HERE / "results", found, text, "checkpoints_")


if __name__ == "__main__":
    main()
