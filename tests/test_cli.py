"""`python -m jaxpipe`, called as a function."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpipe import cli
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
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 12
    assert capsys.readouterr().out == ""
    assert main(["simulate", str(path), "--stages", "3"]) == 2
    assert "is a table of 2 stages and 3 micro-batches, but 3 stages" in capsys.readouterr().err


def test_chunks_costs_of_stages_and_a_trace(capsys, tmp_path):
    costs = ["--forward", "2,1,1,1", "--memory", "3e9", "--pending", "1e9"]
    trace = ["--trace", str(tmp_path / "out.json")]
    assert (
        main(
            [
                "plot",
                "interleaved_zero_bubble",
                "--stages",
                "4",
                "--chunks",
                "2",
                "--micro-batches",
                "4",
                *costs,
                *trace,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("interleaved_zero_bubble: 2 ranks x 2 chunks, 4 micro-batches: makespan ") and "| 0F0" in out
    assert (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "1f1c", *COUNTS], "Did you mean '1f1b'?"),
        (["plot", "1f1b"], "1f1b needs --stages and --micro-batches"),
        (["simulate", "gpipe", "--stages", "0", "--micro-batches", "1"], "num_stages=0"),
        (["plot", "gpipe", *COUNTS, "--output", "out.pdf"], "'out.pdf' must end in one of .svg, .png, .json"),
        (["simulate", "gpipe", *COUNTS, "--comm", "-1"], "comm=-1"),
        (["simulate", "gpipe", *COUNTS, "--chunks", "2"], "num_chunks=2 with 'gpipe'"),
        (["simulate", "gpipe", *COUNTS, "--memory", "1,2"], "memory has 2 entries, but the schedule has 4 stages"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "{bad}"], "bad.csv': it is no UTF-8 text"),
        (["simulate", "{folder}"], "folder.csv': Is a directory"),
        (["plot", "{missing}"], "No such file or directory"),
        (["plot", "gpipe", *COUNTS, "--forward", "1e400"], "forward=1000"),
        (["plot", "gpipe", *COUNTS, "--comm", "1e-400"], "comm=1/1000"),
        (["simulate", "gpipe", "--stages", "1" + "0" * 30, "--micro-batches", "8"], "the product may be at most"),
        (["simulate", "gpipe", "--stages", "4", "--micro-batches", "1" + "0" * 30], "the product may be at most"),
        (["simulate", "gpipe", "--stages", "4", "--micro-batches", "-8"], "num_micro_batches=-8"),
        (["plot", "gpipe", *COUNTS, "--output", "{missing}/x.json"], "cannot write"),
        (["plot", "gpipe", *COUNTS, "--output", "{bad}"], "must end in one of .svg, .png, .json"),
        (["plot", "gpipe", *COUNTS, "--output", "{taken}"], "Is a directory"),
        (["inspect", "{bad}"], "expected a checkpoint, found none"),
        (["inspect", "{folder}"], "expected a checkpoint, found none"),
        (["inspect", "{foreign}"], "expected the manifest of a checkpoint, found something else"),
        (["inspect", "{deep}"], "expected the manifest of a checkpoint, found something else"),
        (["inspect", "{binary}"], "expected a readable manifest"),
        (["inspect", "{long}"], "expected a checkpoint, found: [Errno 36] File name too long"),
        (["inspect", ""], "expected the path of a folder"),
        (["inspect", "{folder}", "--tag", "x" * 300], "File name too long"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value)[:30],
)
def test_bad_input_is_one_line_too(capsys, tmp_path, arguments, message):
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe0F0")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "taken.json").mkdir()
    for name, content in (("foreign", b"{}"), ("deep", b"[" * 100_000), ("binary", b"\xff")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_bytes(content)
    places = {path.stem: str(path) for path in tmp_path.iterdir()}
    places |= {"missing": str(tmp_path / "missing.csv"), "long": "x" * 300}
    assert main([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("jaxpipe: ") and message in captured.err


@pytest.mark.parametrize("cost", ["1e99999999999", "nan", "inf", "1/0", "0x10", "9" * 5000])
def test_costs_that_are_no_numbers_in_range(capsys, cost):
    with pytest.raises(SystemExit) as caught:
        main(["simulate", "gpipe", *COUNTS, "--forward", cost])
    assert caught.value.code == 2 and "is not a number in range; write 2, 1.1 or 11/10" in capsys.readouterr().err


@pytest.mark.parametrize("costs", [["--comm", "1e100"], ["--forward", "1e-100", "--comm", "1e100"], ["--forward", "0"]])
def test_costs_of_any_size_in_range(capsys, tmp_path, costs):
    assert main(["plot", "1f1b", *COUNTS, *costs]) == 0
    assert len(capsys.readouterr().out) < 20_000_000
    for name in ("x.json", "x.svg"):
        assert main(["plot", "1f1b", *COUNTS, *costs, "--output", str(tmp_path / name)]) == 0


def run(*arguments, **options):
    """The command as a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "jaxpipe", *arguments], stderr=subprocess.PIPE, **options)


def test_nobody_reads_on():
    """As in `python -m jaxpipe plot ... | head -1`."""
    with run("plot", "1f1b", "--stages", "16", "--micro-batches", "1000", stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"1f1b: 16 ranks")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk():
    with open("/dev/full", "w") as full, run("plot", "1f1b", *COUNTS, stdout=full) as process:
        assert process.stderr.read() == b"jaxpipe: the output cannot be written: No space left on device.\n"
    assert process.returncode == 2


def test_an_interrupt(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "render", interrupt)
    assert main(["plot", "1f1b", *COUNTS]) == 130
    assert capsys.readouterr() == ("", "")
