"""`python -m jaxpipe`, called as a function."""

import json

import pytest

from jaxpipe.cli import main
from jaxpipe.schedules import one_f_one_b

COUNTS = ["--stages", "4", "--micro-batches", "8"]


def test_simulate(capsys):
    assert main(["simulate", "1f1b", *COUNTS]) == 0
    assert capsys.readouterr().out == (
        "1f1b: <Schedule 4 ranks x 8 micro-batches, 22 ticks>\n"
        "sync        none  neighbour  global\n"
        "makespan      33         40      40\n"
        "bubble         9         16      16\n"
        "bubble %    27.3       40.0    40.0\n"
        "peak live   4 3 2 1  (micro-batches, rank 0 first)\n"
    )


def test_costs_are_exact(capsys):
    assert main(["simulate", "1f1b", *COUNTS, "--backward-input", "1.1", "--backward-weight", "4/5"]) == 0
    assert "makespan    31.9       38.2    38.2" in capsys.readouterr().out


def test_plot_in_the_terminal(capsys):
    assert main(["plot", "forward_only", *COUNTS, "--sync", "global"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("forward_only: 4 ranks, 8 micro-batches: makespan 11 (global sync), bubble 3 = 27.3%\n")
    assert "rank 3 | .........F0 F1 F2 F3 F4 F5 F6 F7" in out


def test_a_file_brings_its_own_counts(capsys, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(one_f_one_b(2, 3).to_csv())
    assert main(["plot", str(path), "--output", str(tmp_path / "out.json")]) == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["traceEvents"]) == 2 + 12
    assert capsys.readouterr().out == ""
    assert main(["simulate", str(path), "--stages", "3"]) == 2
    assert "is a table of 2 stages and 3 micro-batches, but 3 stages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "1f1c", *COUNTS], "did you mean '1f1b'?"),
        (["plot", "1f1b"], "1f1b needs --stages and --micro-batches"),
        (["simulate", "gpipe", "--stages", "0", "--micro-batches", "1"], "num_stages=0"),
        (["plot", "gpipe", *COUNTS, "--output", "out.pdf"], "'out.pdf' must end in one of .svg, .png, .json"),
        (["simulate", "gpipe", *COUNTS, "--comm", "-1"], "comm=-1"),
    ],
)
def test_errors_are_one_line_on_stderr(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("jaxpipe: ") and message in captured.err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["simulate", "gpipe", "--comm", "fast"]])
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "python -m jaxpipe" in capsys.readouterr().err
