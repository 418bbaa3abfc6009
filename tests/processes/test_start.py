"""What `start` refuses, and that one process needs nothing."""

import jax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError
from jaxpipe.processes.launch import COORDINATOR, NUM_PROCESSES, PROCESS_ID


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2, "process_id": 0}, "coordinator_address is missing"),
        ({"coordinator_address": "a:1"}, "num_processes and process_id is missing"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "it is host:port"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "from 0 to 1"),
        ({"coordinator_address": "a:1", "num_processes": 0, "process_id": 0}, "num_processes=0"),
        ({"coordinator_address": "a:1", "num_processes": True, "process_id": 0}, "num_processes=True"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout=0"),
        ({"heartbeat_timeout": "soon"}, "heartbeat_timeout='soon'"),
    ],
)
def test_what_does_not_make_sense(arguments, message):
    with pytest.raises(ConfigError, match=message):
        jaxpipe.start(**arguments)


def test_one_process_needs_nothing(monkeypatch):
    jaxpipe.start("127.0.0.1:1", 1, 0)
    for name, value in {COORDINATOR: "127.0.0.1:1", NUM_PROCESSES: "1", PROCESS_ID: "0"}.items():
        monkeypatch.setenv(name, value)
    jaxpipe.start()
    assert not jax.distributed.is_initialized()


def test_it_has_to_come_first(monkeypatch):
    jax.devices()
    for name, value in {COORDINATOR: "127.0.0.1:1", NUM_PROCESSES: "2", PROCESS_ID: "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="as the first thing in the program"):
        jaxpipe.start()
