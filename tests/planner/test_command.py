"""`python -m jaxpipe plan`: what it prints, and what it says when it cannot."""

import pytest

from jaxpipe.cli import main

PROJECT = """
from tests.planner.gpts import gpt

def training():
    module, example = gpt()
    return module, None, example, {"compute_dtype": "float16", "loss_scale": "dynamic"}

def without():
    module, example = gpt()
    return module, None, example, None
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    (tmp_path / "a_plan_of_mine.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)


def test_it_prints_a_plan(capsys):
    arguments = ["--chips", "2", "--global-batch", "4", "--chip", "A100"]
    assert main(["plan", "a_plan_of_mine:training", *arguments, "--memory", "40GB"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 chips of a100, 40.0 GB each, a global batch of 4 rows;")
    assert "compute_dtype='float16'" in printed
    assert main(["plan", "a_plan_of_mine:without", *arguments]) == 0
    assert "compute_dtype='bfloat16'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a_plan_of_mine:trainin"], "Did you mean 'training'?"),
        (["a_plan_of_mine:training", "--chip", "v9"], "Known chips: v4, v5e"),
        (["a_plan_of_mine:training", "--memory", "much"], "--memory much: write bytes"),
        (["a_plan_of_mine:training", "--chips", "0"], "chips=0 must be an integer"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(["plan", "--chips", "2", "--global-batch", "4", *arguments]) == 2
    assert message in capsys.readouterr().err
