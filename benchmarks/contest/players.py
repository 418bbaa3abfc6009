"""Contestants as groups of processes: started, told what to do, timed, ended."""

import dataclasses
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
# Beyond it a contestant hangs: the longest that one does is to compile.
PATIENCE = 600


@dataclasses.dataclass(frozen=True)
class Entry:
    """What takes part.

    Attributes:
      name: in the tables.
      script: here, with `kind` as its argument.
      needs: the packages without which it cannot take part.
      stages: S; 1 for one device or one process.
      simulated: simulated devices, in one process; or None for a process of torch for each stage, with `threads` each.
      evaluates: whether it has an evaluation.
    """

    name: str
    script: str
    kind: str
    needs: tuple[str, ...]
    stages: int
    simulated: int | None = None
    threads: int = 1
    evaluates: bool = True

    @property
    def setting(self) -> str:
        """Processes, and devices or threads in each."""
        if self.simulated is not None:
            return f"1 process, {self.simulated} device{'s' if self.simulated > 1 else ''}"
        some = f"{self.stages} process{'es' if self.stages > 1 else ''}"
        return f"{some}, {self.threads} thread{'s' if self.threads > 1 else ''}{' each' if self.stages > 1 else ''}"


class Player:
    """The processes of an entry; a context manager."""

    def __init__(self, entry: Entry, task: Mapping[str, Any]):
        self.entry = entry
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, str(HERE / entry.script), entry.kind, "--stages", str(entry.stages)]
        command += ["--task", json.dumps(task)]
        count = 1 if entry.simulated is not None else entry.stages
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=self._environment(rank, count, port),
            )
            for port in [_free_port()]
            for rank in range(count)
        ]

    def _environment(self, rank: int, count: int, port: int) -> dict[str, str]:
        """Of one process; the variables that the launchers of torch and DeepSpeed would set."""
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        common = {**os.environ, "PYTHONPATH": path}
        if self.entry.simulated is not None:
            return {**common, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.entry.simulated)}
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_SIZE": count}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": self.entry.threads}
        settings = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        return {**common, **settings, **{name: str(value) for name, value in {**ranks, **meeting}.items()}}

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *error: object) -> None:
        """Closing stdin ends them; those that have failed wait for each other in vain."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=1 if error[0] is not None else 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()

    def can(self, work: str) -> bool:
        """Whether it does such work at all."""
        return work == "train" or self.entry.evaluates

    def ready(self) -> None:
        """Waits until all have made their model."""
        self._replies()

    def do(self, work: str, number: int) -> tuple[float, float]:
        """Does `work` with the batch of this number. Returns the loss, and the seconds until all processes had done it."""
        start = time.perf_counter()
        for process in self._processes:
            _pipe(process.stdin).write(f"{work} {number}\n")
            _pipe(process.stdin).flush()
        losses = self._replies()
        seconds = time.perf_counter() - start
        return next(loss for loss in reversed(losses) if loss is not None), seconds

    def _replies(self) -> list[Any]:
        """A line of each process, or the end of the benchmark with what they have printed."""
        found: dict[int, Any] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                selector.register(_pipe(process.stdout), selectors.EVENT_READ, rank)
            while len(found) < len(self._processes):
                ready = selector.select(PATIENCE)
                if not ready:
                    raise SystemExit(
                        f"{self.entry.name}, S = {self.entry.stages}: no answer for {PATIENCE} s.\n{self._tail()}"
                    )
                for key, _ in ready:
                    line = _pipe(self._processes[key.data].stdout).readline()
                    if not line:
                        raise SystemExit(
                            f"{self.entry.name}, S = {self.entry.stages}: process {key.data} ended.\n{self._tail()}"
                        )
                    found[key.data] = json.loads(line)
                    selector.unregister(key.fileobj)
        return [found[rank] for rank in sorted(found)]

    def _tail(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-40:])


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
