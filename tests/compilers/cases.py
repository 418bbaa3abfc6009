"""Steps that the real compilers are given, each in a process of its own, and their reports.

`python -m tests.compilers.cases NAME FILE` compiles the case of that name and pickles its report. The suite sets flags for
simulated devices, which other compilers do not know; so a case gets a clean environment.

A compilation takes a minute or more, and several tests look at each. So reports are kept in the folder JAXPIPE_REPORTS (for
the time of the process, if that is not set) under a key of what they depend on: the sources of the library, of the model
and of this file, and the versions of the compilers. A second run, or another pytest process, reads them.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = {"v5e:2x4": ("libtpu", "tpu"), "h100:8": ("jax_plugins", "cuda")}


@dataclass(frozen=True)
class Case:
    """A GPT of 16 blocks of width 1024 on eight chips, 16 micro-batches of 4 rows on each data rank.

    Attributes:
      mesh: sizes of the axes.
      config: beside the number of micro-batches.
      dtype: of the weights.
      sharding: by path; None shards nothing over further axes.
      evaluation: an evaluation instead of a training step.
    """

    topology: str
    mesh: dict[str, int] = field(default_factory=lambda: {"pipe": 4, "data": 2})
    config: dict[str, Any] = field(default_factory=lambda: {"schedule": "1f1b"})
    dtype: str = "float32"
    sharding: list[tuple[str, tuple[str | None, ...]]] | None = None
    evaluation: bool = False

    @property
    def is_tpu(self) -> bool:
        return not self.topology.startswith("h100")


BF16 = {"compute_dtype": "bfloat16"}
# The products of a block are cut by columns, then by rows, so that one sum over `model` follows each pair.
TENSOR = [("qkv", (None, "model")), ("up", (None, "model")), ("out", ("model", None)), ("down", ("model", None))]


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for kind, topology in (("tpu", "v5e:2x4"), ("gpu", "h100:8")):
        for schedule in ("1f1b", "eager_1f1b", "gpipe"):
            found[f"{kind}-{schedule}-bfloat16"] = Case(topology, config={"schedule": schedule, **BF16})
        found[f"{kind}-1f1b-float32"] = Case(topology)
        found[f"{kind}-zero1-bfloat16"] = Case(topology, config={"schedule": "1f1b", "zero_stage": 1, **BF16})
        cube = {"pipe": 2, "data": 2, "model": 2}
        found[f"{kind}-model2-bfloat16"] = Case(topology, cube, {"schedule": "1f1b", **BF16}, sharding=TENSOR)
        found[f"{kind}-evaluation-bfloat16"] = Case(topology, config=dict(BF16), evaluation=True)
    return found


CASES = _cases()


def need(case: Case) -> None:
    """Skips the test, with the reason, if the compiler of the case is not installed."""
    module, extra = COMPILERS[case.topology]
    if importlib.util.find_spec(module) is None:
        pytest.skip(
            f"the compiler for {case.topology} is not installed; make test-compilers makes an environment with it"
        )


def report_of(name: str) -> Any:
    """The report of a case; compiled once, by whichever process asks first."""
    need(CASES[name])
    return _report_in(name, _folder())


@functools.cache
def _report_in(name: str, folder: Path) -> Any:
    file = folder / name
    with _alone(file.with_suffix(".lock")):
        if not file.exists():
            # Renamed when it is whole, so that a run that was interrupted leaves no half of a report.
            _compile(name, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
    return pickle.loads(file.read_bytes())


def _compile(name: str, file: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_", "LIBTPU"))}
    command = [sys.executable, "-m", "tests.compilers.cases", name, str(file)]
    run = subprocess.run(command, cwd=ROOT, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, f"{name} was not compiled:\n{run.stderr[-4000:]}"


@functools.cache
def _folder() -> Path:
    """Where the reports of this version are; those of other versions beside it are deleted."""
    kept = Path(os.environ.get("JAXPIPE_REPORTS") or _for_this_process().name).absolute()
    folder = kept / _version()
    folder.mkdir(parents=True, exist_ok=True)
    for other in kept.glob("reports-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@functools.cache
def _for_this_process() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jaxpipe-")  # kept by the cache, so it goes when the process ends


def _version() -> str:
    """The name of a folder: a key of everything that a report depends on."""
    key = hashlib.sha256()
    for file in (*sorted((ROOT / "jaxpipe").rglob("*.py")), ROOT / "benchmarks/gpt.py", Path(__file__)):
        key.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    for package in importlib.metadata.distributions():
        if package.name.startswith(("jax", "libtpu", "nvidia", "optax")):
            key.update(f"{package.name} {package.version}\0".encode())
    return f"reports-{key.hexdigest()[:16]}"


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time is inside."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(name: str, file: str) -> None:
    """Compiles a case."""
    import jax.numpy as jnp
    import optax
    from jax.sharding import PartitionSpec

    import jaxpipe
    from benchmarks.gpt import Gpt

    case = CASES[name]
    options: dict[str, Any] = {}
    if case.sharding is not None:
        options["sharding"] = [(path, PartitionSpec(*spec)) for path, spec in case.sharding]
    gpt = Gpt(dtype=jnp.dtype(case.dtype), by_head=case.sharding is not None)
    report = jaxpipe.compile(
        gpt.module(**options),
        optax.adam(1e-3),
        mesh=jaxpipe.make_mesh(**case.mesh, devices=jaxpipe.topology(case.topology)),
        example=gpt.example(case.mesh["data"]),
        config={"num_micro_batches": 16, **case.config},
        evaluation=case.evaluation,
    )
    Path(file).write_bytes(pickle.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
