"""What `start` refuses, and that one process needs nothing."""

import contextlib

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
        ({"step_timeout": 0.5}, "step_timeout=0.5"),
        ({"step_timeout": None}, "step_timeout=None"),
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


def test_one_process_may_start_late_and_often():
    jax.devices()
    for _ in range(2):
        jaxpipe.start()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("name", "value", "several"),
    [
        ("SLURM_STEP_NUM_TASKS", "2", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
        ("OMPI_COMM_WORLD_SIZE", "16", True),
        ("TPU_WORKER_HOSTNAMES", "host-0,host-1", True),
        ("TPU_WORKER_HOSTNAMES", "host-0", False),
        ("JAX_COORDINATOR_ADDRESS", "host-0:1", True),
    ],
)
def test_a_late_start_is_an_error_only_if_there_are_others(monkeypatch, name, value, several):
    jax.devices()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="too late") if several else contextlib.nullcontext():
        jaxpipe.start()


def test_it_does_not_join_what_was_joined_already(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="Leave that out"):
        jaxpipe.start("127.0.0.1:1", 2, 0)
