"""A fault in one of several processes: all others end, say which one it was, and the launch has its exit code.

That they end soon is not tested: without the messages that are, they would wait for minutes, or for ever.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 600
FAULTS = {
    "killed 1": ("-n", "3"),
    "killed 0": ("-n", "2"),
    "stopped": ("-n", "2"),
    "raises": ("-n", "2"),
    "ends early": ("-n", "2"),
    "stuck": ("-n", "2"),
}


@pytest.fixture(scope="module")
def launches():
    """All of them at the same time, because most of them wait."""
    script = str(ROOT / "tests" / "contracts" / "processes_faults.py")
    started = {
        fault: subprocess.Popen(
            [
                *(sys.executable, "-m", "jaxpipe", "launch", *options, "--devices-per-process", "1", script),
                *([fault] if fault == "ends early" else fault.split()),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for fault, options in FAULTS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def finish(process):
    """The exit code, and what each process has printed."""
    out, _ = process.communicate(timeout=LIMIT)
    lines: dict[str, str] = {}
    for line in out.splitlines():
        if found := re.match(r"\[(\d)\] (.*)", line):
            lines[found[1]] = lines.get(found[1], "") + found[2] + "\n"
    return process.returncode, lines, out


@pytest.mark.slow
def test_a_killed_process(launches):
    code, said, out = finish(launches["killed 1"])
    assert code == 137, out
    for number in "02":
        assert f"jaxpipe: process {number} of 3 ends. Process 1 is gone without a word" in said[number]


@pytest.mark.slow
def test_a_killed_coordinator(launches):
    code, said, out = finish(launches["killed 0"])
    assert code == 137, out
    # JAX notices it, too, and may be the first to end the process.
    assert "Process 0 is gone without a word" in said["1"] or "leader task" in said["1"]


@pytest.mark.slow
def test_a_stopped_process(launches):
    code, said, out = finish(launches["stopped"])
    assert code == 134, out  # JAX has ended process 0
    assert "jaxpipe: process 1 has not been heard of for" in said["0"]


@pytest.mark.slow
def test_an_exception(launches):
    code, said, out = finish(launches["raises"])
    assert code == 1, out
    assert "DataError: the file is empty" in said["1"] and "Process 1 of 2 ends with this exception." in said["1"]
    assert "jaxpipe: process 0 of 2 ends. Process 1 ended with DataError: the file is empty" in said["0"]


@pytest.mark.slow
def test_a_process_that_ends_while_another_waits_for_it(launches):
    code, said, out = finish(launches["ends early"])
    assert code == 1, out
    for number in "01":
        assert "Process 1 has ended, and process 0 waits for it" in said[number]


@pytest.mark.slow
def test_sigterm_and_a_stuck_data_iterator(launches):
    code, said, out = finish(launches["stuck"])
    assert code == 1, out
    calls = {re.search(r"preempted after step (\d+)", text)[1] for text in said.values()}
    assert len(said) == 2 and len(calls) == 1, out
    for text in said.values():
        assert re.search(r"of train_batch has not finished for \d+ s \(step_timeout=8\): process 1 has not begun", text)
        assert "been in its data iterator for" in text
    assert "time.sleep(10_000)" in said["1"] and "time.sleep" not in said["0"]
