"""Runs a script in several processes of this machine, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 600


def launched(script, processes, devices, *arguments, code=0):
    """What each of the processes has found: the JSON behind `found ` in its output, in the order of their numbers."""
    command = [sys.executable, "-m", "jaxpipe", "launch", "-n", str(processes), "--devices-per-process", str(devices)]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "contracts" / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == code, done.stdout[-5000:]
    lines = sorted(line for line in done.stdout.splitlines() if "] found " in line)
    return [json.loads(line.partition("found ")[2]) for line in lines]
