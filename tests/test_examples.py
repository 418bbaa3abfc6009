"""The example that `make demo` runs, as a user runs it, but tiny."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = "--stages 2 --data 1 --num-blocks 2 --d-model 32 --heads 2 --seq 32 --steps 4 --eval-every 2 --sample-bytes 3"


def run(tmp_path, output, *options):
    # As after an installation: the package is found wherever the script is started.
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is nearly all of the time
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            EXAMPLES / "train_gpt.py",
            *TINY.split(),
            "--micro-batches",
            "2",
            "--output",
            output,
            *options,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done


@pytest.mark.slow
def test_train_gpt(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "new" / "folder"
    done = run(tmp_path, output, "--checkpoints", tmp_path / "run")
    for picture in ("loss.png", "schedule.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
        assert str(output / picture) in done.stdout

    losses = {
        name: float(value)
        for name, value in re.findall(r"^(training|validation|bigram).*? (\d\.\d{3}) ", done.stdout, re.M)
    }
    before = re.search(r"^step +0: validation loss (\d\.\d{3})", done.stdout, re.M)
    assert before and losses["validation"] < float(before[1]) and 1 < losses["training"] < 6
    assert 1 < losses["bigram"] < 4
    assert re.findall(r"^step +(\d): validation", done.stdout, re.M) == ["0", "2", "4"]
    assert "step 4/4" in done.stdout and "\r" not in done.stdout, "plain lines, because this is no terminal"
    assert "Block" in done.stdout and "head (tied to Embedding)" in done.stdout
    assert len(re.findall(r"^--- ", done.stdout, re.M)) == 2

    # Two steps more, at another number of stages: as if it had not stopped in between.
    again = run(tmp_path, output, "--checkpoints", tmp_path / "run", "--steps", "6", "--stages", "3")
    assert f"going on from {tmp_path}/run/global_step4" in again.stdout
    assert re.findall(r"^step +(\d): validation", again.stdout, re.M) == ["4", "6"]
    assert "step 2/2" in again.stdout
