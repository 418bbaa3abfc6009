"""SIGTERM and one process. (Several: tests/contracts/test_processes_faults.py.)"""

import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.processes import preemption

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(preemption, "_asked", threading.Event())
    monkeypatch.setattr(preemption, "_listening", False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_heard_and_remembered(fresh):
    assert not preemption.preempted() and not preemption.preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.preempted() and preemption.preempted()


def test_before_the_first_call_sigterm_ends_the_program():
    script = "import os, signal, jaxpipe; os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)
    assert done.returncode == -signal.SIGTERM


def test_the_first_call_has_to_come_from_the_main_thread(fresh):
    caught = []

    def call():
        try:
            preemption.preempted()
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_several_processes_need_start(fresh, monkeypatch):
    monkeypatch.setattr(preemption, "jax", types.SimpleNamespace(process_count=lambda: 2, distributed=jax.distributed))
    with pytest.raises(ConfigError, match=r"Call jaxpipe.start\(\)"):
        preemption.preempted()
