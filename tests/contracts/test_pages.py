"""The code on the pages about generation, lengths and two streams runs as it stands, and gives what the pages say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_generation():
    rows = re.findall(r"^ ?\[\[?([\d ]+)\]", run("generation"), re.M)
    assert len(rows) == 10 and all(len(row.split()) == 14 for row in rows)


@pytest.mark.slow
def test_lengths():
    losses = [float(line) for line in run("lengths").split()]
    assert len(losses) == 2 and 3 < losses[1] < losses[0] < 4


@pytest.mark.slow
def test_two_streams():
    first, last, other = map(float, re.findall(r"\d\.\d+", run("two_streams")))
    assert last < first / 2 and other < first / 2
