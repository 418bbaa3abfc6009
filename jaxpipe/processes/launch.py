"""Runs a script as several processes on this machine, as `python -m jaxpipe launch` does. No JAX here.

Each process finds the others through three environment variables, which `jaxpipe.start` reads. What the processes print
comes line by line, with the number of the process in front. The first process that fails ends all others, and its exit
code is that of the launch.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from jaxpipe.errors import ConfigError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAXPIPE_COORDINATOR", "JAXPIPE_NUM_PROCESSES", "JAXPIPE_PROCESS_ID"
# Seconds between the polite request to end and the kill. A process with a preemption service may not obey the request.
GRACE = 10.0
POLL = 0.05


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to run, and how often.

    Attributes:
      command: the script with its arguments, or `-m`, a module and its arguments; Python is put in front.
      num_processes: processes on this machine, 1 or more.
      devices_per_process: simulated CPU devices of each; None leaves the devices as they are.
      num_nodes, node_rank: how many machines take part, and which of them this is.
      coordinator: `host:port` of process 0, needed with several machines. With one, a free port of this machine is used.
      restarts: how often to start all processes again after a failure.

    Raises:
      ConfigError: a number is out of range, or the coordinator is missing.
    """

    command: Sequence[str]
    num_processes: int
    devices_per_process: int | None = None
    num_nodes: int = 1
    node_rank: int = 0
    coordinator: str | None = None
    restarts: int = 0

    def __post_init__(self):
        for name, least in {"num_processes": 1, "devices_per_process": 1, "num_nodes": 1, "restarts": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"launch: {name} is {value}, but it has to be {least} or more.")
        if not 0 <= self.node_rank < self.num_nodes:
            raise ConfigError(
                f"launch: node_rank is {self.node_rank} of {self.num_nodes} machines. Machines are numbered from 0 to "
                f"{self.num_nodes - 1}, and each has a number of its own."
            )
        if self.num_nodes > 1 and self.coordinator is None:
            raise ConfigError(
                f"launch: {self.num_nodes} machines need --coordinator HOST:PORT, the same on all of them: a name of "
                "machine 0 that the others can reach, and a port that is free there."
            )
        if not self.command:
            raise ConfigError("launch: there is no script to run. Write it behind the options: launch -n 2 train.py.")

    def environment(self, number: int, base: Mapping[str, str], coordinator: str) -> dict[str, str]:
        """The environment of the process that is the `number`-th on this machine."""
        made = {
            **base,
            COORDINATOR: coordinator,
            NUM_PROCESSES: str(self.num_processes * self.num_nodes),
            PROCESS_ID: str(self.process_id(number)),
            "PYTHONUNBUFFERED": "1",
        }
        if self.devices_per_process is not None:
            made["JAX_NUM_CPU_DEVICES"] = str(self.devices_per_process)
            made.setdefault("JAX_PLATFORMS", "cpu")
        return made

    def process_id(self, number: int) -> int:
        """The number among all machines of the `number`-th process on this one."""
        return self.node_rank * self.num_processes + number

    def run(self) -> int:
        """Runs the processes until all have ended, and again after a failure as often as is wanted.

        Returns:
          0 if every process returned 0. Otherwise the exit code of the one that failed first; 128 + n if signal n ended it,
          and 130 after Ctrl-C.
        """
        for attempt in range(self.restarts + 1):
            code, asked = _Processes(self).wait()
            if code == 0 or asked or attempt == self.restarts:
                return code
            _say(
                f"attempt {attempt + 1} failed with exit code {code}; starting again ({self.restarts - attempt} left)."
            )
        raise AssertionError("unreachable")


class _Processes:
    """The processes of one attempt."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self._port: socket.socket | None = None
        coordinator = launch.coordinator
        if coordinator is None:
            self._port = reserved_port()
            coordinator = f"127.0.0.1:{self._port.getsockname()[1]}"
        self.running: list[subprocess.Popen[bytes]] = []
        self.readers: list[threading.Thread] = []
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # in the order in which they end
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()  # the signals that this launch was sent
        self._deadline = float("inf")
        self._handlers = {
            number: signal.signal(number, lambda number, _: self._asked.put(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            for number in range(launch.num_processes):
                process = subprocess.Popen(
                    [sys.executable, *launch.command],
                    env=launch.environment(number, os.environ, coordinator),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the terminal comes to this process, which passes it on
                )
                self.running.append(process)
                self.readers.append(self._thread(_copy, process.stdout, launch.process_id(number)))
                self._thread(self._await, number)
        except BaseException:
            self._end(signal.SIGKILL)
            self._release()
            raise

    def _thread(self, target: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        return thread

    def _await(self, number: int) -> None:
        self.running[number].wait()
        self._ended.put(number)

    def _release(self) -> None:
        if self._port is not None:
            self._port.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def wait(self) -> tuple[int, bool]:
        """Waits for all processes.

        Returns:
          The exit code of the attempt, and whether this launch was asked to end.
        """
        failed: int | None = None
        asked: list[int] = []
        left = len(self.running)
        try:
            while left:
                while not self._asked.empty():
                    asked.append(self._asked.get())
                    self._pass_on(asked)
                try:
                    number = self._ended.get(timeout=POLL)
                except queue.Empty:
                    if time.monotonic() > self._deadline:
                        self._end(signal.SIGKILL)
                        self._deadline = float("inf")
                    continue
                left -= 1
                if failed is None and (failed := self._failure(number)) is not None and self._deadline == float("inf"):
                    self._end(signal.SIGTERM)
                    self._deadline = time.monotonic() + GRACE
        finally:
            if failed is not None or asked:
                self._end_groups()
            for reader in self.readers:
                reader.join()
            self._release()
        return 128 + signal.SIGINT if signal.SIGINT in asked else failed or 0, bool(asked)

    def _pass_on(self, asked: list[int]) -> None:
        """Passes the last signal on. After SIGTERM there is no hurry: a process may first have something to save."""
        if asked.count(signal.SIGINT) > 1:
            self._end(signal.SIGKILL)
        elif asked[-1] not in asked[:-1]:  # schedulers may send SIGTERM twice
            self._end(asked[-1])
        if asked[-1] == signal.SIGINT:
            self._deadline = time.monotonic() + GRACE

    def _failure(self, number: int) -> int | None:
        """The exit code of a process that has ended, if it has failed."""
        code = self.running[number].returncode
        if not code:
            return None
        what = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        _say(f"process {self.launch.process_id(number)} {what}; ending the others.")
        return 128 - code if code < 0 else code

    def _end(self, number: int) -> None:
        for process in self.running:
            if process.poll() is None:
                _signal_group(process.pid, number)

    def _end_groups(self) -> None:
        """Ends what failed processes have started and left behind, such as workers that load data."""
        for process in self.running:
            _signal_group(process.pid, signal.SIGKILL)


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


_lock = threading.Lock()


def _copy(stream: IO[bytes], process_id: int) -> None:
    """Copies what a process prints, with its number in front of every line."""
    for line in stream:
        # If nobody reads it any more, it is dropped; else the process would hang as soon as it prints.
        with _lock, contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(b"[%d] %s%s" % (process_id, line, b"" if line.endswith(b"\n") else b"\n"))
            sys.stdout.buffer.flush()


def _say(text: str) -> None:
    with _lock, contextlib.suppress(OSError, ValueError):
        print(f"jaxpipe launch: {text}", file=sys.stderr, flush=True)


def reserved_port() -> socket.socket:
    """A socket that is bound to a free port of this machine, which is nobody else's until it is closed.

    The service of JAX binds with SO_REUSEPORT, so it can have the port as well; and because this socket does not listen, it
    gets all connections. Without a socket that holds the port, two launches could be given the same one: with
    SO_REUSEPORT both services start, and the processes of both end with errors of the network.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held
