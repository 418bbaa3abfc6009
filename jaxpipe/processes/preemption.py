"""Whether this program was asked to end by SIGTERM, in such a way that all of its processes hear of it at the same call."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

from jaxpipe.errors import ConfigError

_calls = itertools.count()
_asked = threading.Event()
_listening = False


def preempted() -> bool:
    """Whether some process has had SIGTERM; see `Engine.preempted`."""
    global _listening
    if jax.distributed.is_initialized():
        # Each call has a number. The processes agree on one that none of them has reached yet, without the devices.
        if not _asked.is_set() and multihost_utils.reached_preemption_sync_point(next(_calls)):
            _asked.set()
        return _asked.is_set()
    if jax.process_count() > 1:
        raise ConfigError(
            f"preempted() needs the connection that start() makes between the {jax.process_count()} processes. Call "
            "jaxpipe.start() as the first thing in the program."
        )
    if not _listening:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "The first call of preempted() has to come from the main thread: only there can it listen."
            )
        signal.signal(signal.SIGTERM, lambda *_: _asked.set())
        _listening = True
    return _asked.is_set()
