"""`start`: joins the processes of a program, so that what goes wrong in one of them ends all with a message, not a hang."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxpipe.checks import as_count, as_integer, as_number, show
from jaxpipe.errors import ConfigError
from jaxpipe.processes import watchdog
from jaxpipe.processes.channel import Address, Client, Server
from jaxpipe.processes.ending import Ending, say
from jaxpipe.processes.group import Group
from jaxpipe.processes.guard import Guard
from jaxpipe.processes.launch import COORDINATOR, NUM_PROCESSES, PROCESS_ID

# Where JAX looks for several processes, and how many there are if the variable is a number or a list.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


class _Started(NamedTuple):
    given: tuple[str, int, int] | None
    heartbeat_timeout: float
    step_timeout: float


_started: _Started | None = None


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: float = 30,
    step_timeout: float = 600,
) -> None:
    """Joins the processes of this program. Call it first, before anything else of JAX is used.

    Without arguments the processes find each other by themselves under `python -m jaxpipe launch`, SLURM, Open MPI, Cloud
    TPU and Kubernetes. Where there is only one process, this does nothing, so a script may always call it.

    From then on, what goes wrong in one process ends all of them with a message that says which process it was, and with a
    non-zero exit code. For this the processes keep plain TCP connections to process 0, on a port that is free there.

    Args:
      coordinator_address: `host:port` of process 0.
      num_processes: how many there are.
      process_id: the number of this one, from 0.
      heartbeat_timeout: seconds after which a process that is not heard of is taken for dead, and all others end. The end
        of a process, if its machine goes on, is noticed at once.
      step_timeout: seconds after which all processes end because a step has not finished that some of them have begun, for
        example if one is stuck in its data iterator. The first step, which is compiled, may take any time. Later the limit
        must be longer than what a single process may do between two steps while the others wait.

    Raises:
      ConfigError: the arguments are incomplete or out of range, JAX was used before, or `start` was called before with
        other arguments.
    """
    wanted = _Started(
        _given(coordinator_address, num_processes, process_id) or _from_launch(),
        _seconds("heartbeat_timeout", heartbeat_timeout),
        _seconds("step_timeout", step_timeout),
    )
    if (wanted.given is not None and wanted.given[1] == 1) or wanted == _started:
        return
    if jax.distributed.is_initialized():
        raise ConfigError(
            "start() was called before with other arguments."
            if _started is not None
            else "start() cannot be called after jax.distributed.initialize. Leave that out: start() calls it."
        )
    if _initialize(wanted) and jax.process_count() > 1:
        _guard(wanted)


def _seconds(name: str, value: object) -> float:
    seconds = as_number(value)
    if seconds is None or seconds < 1:
        raise ConfigError(f"start({name}={show(value)}): it is a number of seconds, 1 or more.")
    return seconds


def _initialize(wanted: _Started) -> bool:
    """Joins the processes; returns whether there are any others."""
    try:
        address, count, number = wanted.given or (None, None, None)
        jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=round(wanted.heartbeat_timeout))
    except ValueError as error:
        if wanted.given is None and "coordinator_address" in str(error):
            return False  # nobody says that there are several processes
        raise
    except RuntimeError as error:
        if "before" not in str(error):
            raise
        if wanted.given is None and not _several_are_wanted():
            return False
        raise ConfigError(
            f"start() comes too late: {error} Call jaxpipe.start() as the first thing in the program, once, before arrays "
            "are made and before jax.devices() is called."
        ) from error
    return True


def _several_are_wanted() -> bool:
    """Whether the environment says that there are several processes. JAX does not look once its devices are in use."""
    if jax.process_count() > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ:
        return True
    said = [os.environ.get(name, "1") for name in _COUNTS]
    return any("," in text or (text.isdecimal() and int(text) > 1) for text in said)


def _guard(wanted: _Started) -> None:
    """From now on this process ends with a message where another one is the cause that it cannot go on."""
    global _started
    _started = wanted
    number, count = jax.process_index(), jax.process_count()
    connect: Callable[[], Server | Client] | None = None
    address: Address | None = None
    if number == 0:
        try:
            server = Server(count, wanted.given[0].rpartition(":")[0].strip("[]") if wanted.given else None)
            connect, address = lambda: server, server.address
        except OSError as error:
            say(
                f"process 0 cannot listen for the others ({error}). Messages about faults may not say which process failed."
            )
    heard = Group.everyone().broadcast(address)
    if number and heard is not None:
        connect = _client(heard, number)
    ending, activity = Ending(number, count), watchdog.Activity()
    guard = Guard(
        number, count, activity, connect, wanted.heartbeat_timeout, wanted.step_timeout, ending.on_verdict, say
    )
    ending.install(guard)
    watchdog.note(activity)
    threading.Thread(target=guard.run, name="jaxpipe guard", daemon=True).start()


def _client(address: Sequence[Any], number: int) -> Callable[[], Client]:
    hosts, port, token = address
    return lambda: Client(Address(tuple(hosts), port, token), number)


def _given(address: object, count: object, number: object) -> tuple[str, int, int] | None:
    """The three arguments, checked; None if none of them was given."""
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if not any(value is not None for value in arguments.values()):
        return None
    missing = [name for name, value in arguments.items() if value is None]
    if missing:
        raise ConfigError(
            f"start: {' and '.join(missing)} is missing. Give all of {', '.join(arguments)}, or none of them to let the "
            "processes find each other."
        )
    num_processes, process_id = as_count(count), as_integer(number)
    if num_processes is None:
        raise ConfigError(f"start(num_processes={show(count)}): it is an integer, 1 or more.")
    if process_id is None or not 0 <= process_id < num_processes:
        raise ConfigError(
            f"start(process_id={show(number)}): of {num_processes} processes each has a number of its own, from 0 to "
            f"{num_processes - 1}."
        )
    if not isinstance(address, str) or ":" not in address:
        raise ConfigError(f"start(coordinator_address={show(address)}): it is host:port, such as '10.0.0.1:8476'.")
    return address, num_processes, process_id


def _from_launch() -> tuple[str, int, int] | None:
    """What `python -m jaxpipe launch` has put into the environment; None if it has not."""
    if COORDINATOR not in os.environ:
        return None
    return os.environ[COORDINATOR], int(os.environ[NUM_PROCESSES]), int(os.environ[PROCESS_ID])
