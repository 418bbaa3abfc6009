"""How a process ends: what it prints, what it tells the others, its exit code. Each end is that of a program of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from jaxpipe.errors import CheckpointError, DataError
from jaxpipe.processes import ending

ROOT = Path(__file__).parents[2]
LIMIT = 600
HEAD = """
    import multiprocessing, os, sys, threading, time
    from jaxpipe.processes.ending import Ending, say
    from jaxpipe.processes.guard import Guard
    from jaxpipe.processes.verdicts import Verdict
    from jaxpipe.processes.watchdog import Activity

    ending = Ending(1, 4)
    guard = Guard(1, 4, Activity(), None, 30, 600, ending.on_verdict, say)
    guard._send = lambda message: print("sent", message, flush=True)
    guard.connect()
    ending.install(guard)
    def verdict(culprits=(2,), text="Process 2 is gone."):
        threading.Thread(target=lambda: guard._decide(Verdict(culprits, text)), daemon=True).start()
"""


def ends(script, **popen):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HEAD) + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=popen.pop("stderr", subprocess.PIPE),
        text=True,
        timeout=LIMIT,
    )
    return done.returncode, done.stdout, done.stderr


def test_an_exception():
    code, out, err = ends('print("printed", end="")\nraise KeyError("which")')
    assert code == 1 and out.startswith("printed")
    assert "KeyError: 'which'" in err and err.endswith("Process 1 of 4 ends with this exception.\n")
    assert "'bye': \"KeyError: 'which'\"" in out


def test_ctrl_c():
    code, out, _ = ends("raise KeyboardInterrupt")
    assert code == 130 and "'bye': 'KeyboardInterrupt: '" in out


def test_an_exception_that_another_hook_prints():
    code, out, err = ends('sys.excepthook = lambda *_: print("hook")\nraise KeyError("which")')
    assert code == 1 and out.startswith("hook") and "'bye': \"KeyError" in out and err == ""


@pytest.mark.parametrize(("how", "code"), [("", 0), ("sys.exit(3)", 3)])
def test_the_usual_end(how, code):
    found, out, err = ends(how)
    assert found == code and "'bye': None" in out and err == ""


def test_an_error_of_the_network_is_blamed_on_the_process_that_has_caused_it():
    code, out, err = ends(
        """
        threading.Timer(0.2, verdict).start()
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
        """
    )
    assert code == 1 and "sent" not in out, "the others must not be told that it was this process"
    assert "Gloo AllGather" in err
    assert "consequence of this: Process 2 is gone." in err


def test_a_verdict_ends_a_process_that_waits():
    code, out, err = ends("verdict()\ntime.sleep(1000)")
    assert code == 1 and err == "jaxpipe: process 1 of 4 ends. Process 2 is gone.\n" and "sent" not in out


def test_a_process_that_is_stuck_shows_where():
    code, _, err = ends(
        """
        entered = threading.Event()
        def read_from_a_disk_that_hangs():
            entered.set()
            time.sleep(1000)
        threading.Thread(target=lambda: (entered.wait(), verdict((1,), "Process 1 is stuck.")), daemon=True).start()
        read_from_a_disk_that_hangs()
        """
    )
    assert code == 1 and "in read_from_a_disk_that_hangs" in err


def test_closed_outputs_are_no_obstacle():
    code, _, _ = ends("sys.stdout.close(); sys.stderr.close(); verdict(); time.sleep(1000)")
    assert code == 1
    code, _, _ = ends("sys.stdout = sys.stderr = None\nguard._send = lambda message: None\nraise KeyError")
    assert code == 1


def test_an_output_that_nobody_reads_is_no_obstacle():
    read, write = os.pipe()
    soon = "import jaxpipe.processes.ending as module; module.STUCK_OUTPUT = 1"
    code, _, _ = ends(f"{soon}; verdict(text='x' * {1 << 20}); time.sleep(1000)", stderr=write)
    os.close(read)
    os.close(write)
    assert code == 1


def test_children_that_would_have_ended_end():
    code, out, _ = ends(
        """
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
        child.start()
        verdict()
        time.sleep(1000)
        """
    )
    assert code == 1  # `ends` waits until nobody can write to its pipe any more


def test_a_forked_child_says_nothing():
    code, out, err = ends(
        """
        if os.fork() == 0:
            sys.exit(5)
        print("child", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        if os.fork() == 0:
            raise KeyError("in the child")
        print("child", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        """
    )
    assert code == 0 and out.count("sent") == 1 and "child 5" in out and "child 1" in out
    assert "in the child" in err and "Process 1 of 4" not in err


@pytest.mark.parametrize(
    ("error", "foreign"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL"), True),
        (ValueError("UNKNOWN: Gloo"), True),
        (ValueError("it is wrong"), False),
        (DataError("no more"), False),
        (CheckpointError("it failed"), False),
    ],
)
def test_what_may_come_from_another_process(error, foreign):
    assert ending._may_come_from_another(error) == foreign
    outer = CheckpointError("it failed")
    outer.__cause__ = error
    assert ending._may_come_from_another(outer) == foreign
