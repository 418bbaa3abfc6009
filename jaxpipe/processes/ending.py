"""How a process ends where the usual end would hang: it would wait for the others, and they wait for it."""

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
import types

import jax

from jaxpipe.errors import JaxpipeError
from jaxpipe.processes import watchdog
from jaxpipe.processes.guard import Guard
from jaxpipe.processes.verdicts import Verdict

# Seconds.
LINGER = (
    0.5  # between a message and the end: all have to hear of it, and the process that is the cause should end first
)
PATIENCE = 3.0  # an error of the network may be there before it is known whose end has caused it
STUCK_OUTPUT = 8.0  # the end may take so long; perhaps nobody reads what is printed
LONGEST = 2000  # characters of an error that are told to the others


class Ending:
    """Ends this process at once, with a message and a non-zero exit code.

    Args:
      number, count: of this process, and how many there are.
    """

    def __init__(self, number: int, count: int):
        self.number, self.count = number, count
        self.guard: Guard | None = None
        self._process, self._lock = os.getpid(), threading.Lock()

    def install(self, guard: Guard) -> None:
        """From now on exceptions that nobody catches, the end of the process, and forks come here."""
        self.guard = guard
        sys.excepthook = self.on_exception
        atexit.register(self.on_exit)  # runs before that of JAX, which waits for all processes
        os.register_at_fork(after_in_child=self.on_fork)

    def on_verdict(self, verdict: Verdict) -> None:
        """Ends this process because of another one, or because it is stuck itself; called by the thread of the guard."""
        _end_in_any_case()
        text = f"process {self.number} of {self.count} ends. {verdict.text}"
        if self.number in verdict.culprits and self.guard is not None and not self.guard.ended:
            text += f"\nThe main thread of process {self.number} is here:\n{_main_thread()}"
        say(text)
        time.sleep(LINGER)
        with self._lock:
            _leave(1)

    def on_exception(self, kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        """Prints an exception that nobody has caught, tells the others, and ends the process."""
        if os.getpid() != self._process or self.guard is None:
            return sys.__excepthook__(kind, error, trace)
        _end_in_any_case()
        text = "".join(traceback.format_exception(kind, error, trace))
        _print(f"{text}Process {self.number} of {self.count} ends with this exception.")
        if _may_come_from_another(error) and self.guard.decided.wait(PATIENCE) and self.guard.verdict is not None:
            _print(f"It is probably the consequence of this: {self.guard.verdict.text}")
        self._tell(error)
        with self._lock:
            _leave(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def on_exit(self) -> None:
        """Says that this process ends. JAX then waits until the others end, too."""
        if os.getpid() != self._process or self.guard is None:
            return
        error = getattr(sys, "last_value", None)
        if error is not None and not hasattr(sys, "ps1"):  # printed by an `excepthook` that somebody else has installed
            self._tell(error)
            _leave(1)
        self.guard.bye(None)

    def on_fork(self) -> None:
        """A child process takes no part, and keeps no connection open that should end with this process."""
        watchdog.note(None)
        if self.guard is not None:
            self.guard.close()
            self.guard = None

    def _tell(self, error: BaseException) -> None:
        assert self.guard is not None
        if not self.guard.decided.is_set():
            self.guard.connected.wait(1)
            self.guard.bye(f"{type(error).__name__}: {error}"[:LONGEST])


def say(text: str) -> None:
    """Prints a message of this library."""
    _print(f"jaxpipe: {text}")


def _print(text: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or nobody reads it any more
            if stream is sys.stderr:
                print(text, file=stream)
            stream.flush()


def _end_in_any_case() -> None:
    """Ends this process in some seconds, even if it hangs while it prints."""
    with contextlib.suppress(OSError, RuntimeError):
        faulthandler.dump_traceback_later(STUCK_OUTPUT, exit=True, file=os.open(os.devnull, os.O_WRONLY))


def _leave(code: int) -> None:
    """Ends this process and the children that would have ended with it."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    os._exit(code)


def _main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "(it has ended)"


def _may_come_from_another(error: BaseException | None) -> bool:
    """Whether an exception may be what is seen of the end of another process: the devices, or the network, have failed."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: ", str(error)):
            return True
        if isinstance(error, JaxpipeError) and error.__cause__ is None:
            return False
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False
