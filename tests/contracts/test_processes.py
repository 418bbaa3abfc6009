"""Several processes compute what one computes: losses, norms, evaluations, digit by digit up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.contracts.processes import train

ROOT = Path(__file__).parents[2]
LIMIT = 600


def launched(processes, devices, *arguments):
    """What each of the processes has found."""
    command = [sys.executable, "-m", "jaxpipe", "launch", "-n", str(processes), "--devices-per-process", str(devices)]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "contracts" / "processes.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [line.partition("found ")[2] for line in done.stdout.splitlines() if "] found " in line]
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("pipe", "data"), [(2, 2), (4, 1), (1, 4)], ids=["both", "pipe", "data"])
def test_two_processes_train_and_evaluate_as_one(pipe, data):
    found = launched(2, 2, pipe, data)
    assert len(found) == 2 and found[0] == found[1], "every process has the same numbers"
    alone = train(pipe, data)
    for name, value in alone.items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-6, err_msg=name)
