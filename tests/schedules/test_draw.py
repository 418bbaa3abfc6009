"""Every picture shows every op: in text, SVG, PNG and the trace."""

import json
import re
import sys

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Schedule, draw, forward_only, one_f_one_b, render, simulate

SPLIT = Schedule.from_csv("0F0,0F1,,0I0,0W0,0I1,0W1\n,1F0,1I0,1F1,1I1,1W0,1W1\n")


def test_svg(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    draw(simulate(one_f_one_b(4, 8)), path, name="1f1b")
    text = path.read_text()
    shown = re.findall(r">([^<>]+)</text>", text)
    assert [shown.count(str(number)) >= 8 for number in range(8)] == [True] * 8, "F and B of each on four ranks"
    assert "1f1b: 4 ranks, 8 micro-batches: makespan 33, bubble 9 = 27.3%" in shown
    assert {"forward", "backward", "idle", "time", "rank 0", "rank 3"} <= set(shown)
    draw(one_f_one_b(4, 8), tmp_path / "again.svg", name="1f1b")
    draw(SPLIT, tmp_path / "split.svg")
    assert {"input gradient", "weight gradient"} <= set(
        re.findall(r">([^<>]+)</text>", (tmp_path / "split.svg").read_text())
    )
    draw(forward_only(4, 2, num_chunks=2), tmp_path / "chunks.svg")
    assert "forward, chunk 1" in (tmp_path / "chunks.svg").read_text()


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    draw(one_f_one_b(3, 4), str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_trace(tmp_path):
    path = tmp_path / "trace.json"
    timeline = simulate(one_f_one_b(3, 4))
    draw(timeline, path)
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(timeline.starts) == 24
    assert {(event["name"], event["tid"], event["ts"], event["dur"]) for event in events} == {
        (str(op), op.stage, start * 1000, (timeline.ends[op] - start) * 1000) for op, start in timeline.starts.items()
    }
    assert events[0]["args"] == {"stage": 0, "micro_batch": 0}


def test_terminal_text():
    assert render(simulate(one_f_one_b(2, 2)), name="1f1b") == (
        "1f1b: 2 ranks, 2 micro-batches: makespan 9, bubble 3 = 33.3%\n"
        "\n"
        "rank 0 | F0 F1 ......B0=== ...B1===\n"
        "rank 1 | ...F0 B0=== F1 B1=== ......"
    )
    assert "I0" in render(simulate(SPLIT)) and "W1" in render(simulate(SPLIT))
    colored = render(simulate(SPLIT), color=True)
    assert "\033[" in colored
    plain = "\n".join(line.rstrip() for line in re.sub(r"\033\[[\d;]*m", "", colored).splitlines())
    assert plain == render(simulate(SPLIT))
    narrow = render(simulate(one_f_one_b(4, 8)), width=60)
    assert max(map(len, narrow.splitlines()[1:])) <= 60 and narrow.count("rank 3 |") == 2
    # Costs of very different size, and none at all, still give a picture of bounded width.
    assert len(render(simulate(one_f_one_b(2, 2), 0.001, 1, 1), width=10_000)) < 1000
    assert render(simulate(one_f_one_b(2, 2), 0, 0, 0))


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ScheduleError, match=r"must end in one of \.svg, \.png, \.json"):
        draw(SPLIT, tmp_path / "picture.jpg")
    with pytest.raises(ScheduleError, match="cannot write .*: No such file or directory"):
        draw(SPLIT, tmp_path / "nowhere" / "trace.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScheduleError, match=r"pip install 'jaxpipe\[plot\]'"):
        draw(SPLIT, tmp_path / "picture.svg")
