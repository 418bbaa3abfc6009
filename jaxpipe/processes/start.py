"""`start`: joins the processes of a program, so that what goes wrong in one of them ends all with a message, not a hang."""

import os
import sys
import traceback
import types

import jax

from jaxpipe.checks import as_count, as_integer, as_number, show
from jaxpipe.errors import ConfigError
from jaxpipe.processes.launch import COORDINATOR, NUM_PROCESSES, PROCESS_ID


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: float = 30,
) -> None:
    """Joins the processes of this program. Call it first, before anything else of JAX is used.

    Without arguments the processes find each other by themselves under `python -m jaxpipe launch`, SLURM, Open MPI, Cloud
    TPU and Kubernetes. Where there is only one process, this does nothing, so a script may always call it.

    Args:
      coordinator_address: `host:port` of process 0.
      num_processes: how many there are.
      process_id: the number of this one, from 0.
      heartbeat_timeout: seconds after which a process that is not heard of is taken for dead, and all others end.

    Raises:
      ConfigError: the arguments are incomplete or out of range, or JAX was used before.
    """
    seconds = as_number(heartbeat_timeout)
    if seconds is None or seconds < 1:
        raise ConfigError(f"start(heartbeat_timeout={show(heartbeat_timeout)}): it is a number of seconds, 1 or more.")
    given = _given(coordinator_address, num_processes, process_id)
    if given is None:
        given = _from_launch()
    if given is not None and given[1] == 1:
        return
    try:
        if given is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=round(seconds))
        else:
            jax.distributed.initialize(*given, heartbeat_timeout_seconds=round(seconds))
    except ValueError as error:
        if given is None and "coordinator_address" in str(error):
            return  # nobody says that there are several processes
        raise
    except RuntimeError as error:
        if "before" not in str(error):
            raise
        raise ConfigError(
            f"start() comes too late: {error} Call jaxpipe.start() as the first thing in the program, once, before arrays "
            "are made and before jax.devices() is called."
        ) from error
    if jax.process_count() > 1:
        sys.excepthook = _end_at_once


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


def _end_at_once(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Prints an exception that nobody has caught, and ends the process.

    The usual end would wait for the other processes at a barrier, and they wait for this one in a collective.
    """
    text = "".join(traceback.format_exception(kind, error, trace))
    print(f"{text}Process {jax.process_index()} of {jax.process_count()} ends with this exception.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)
