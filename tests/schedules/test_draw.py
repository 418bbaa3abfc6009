"""The suffix of the file is the format, and what goes wrong is told."""

import json
import sys

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import draw, one_f_one_b, simulate


def test_a_schedule_is_simulated_first(tmp_path):
    draw(one_f_one_b(2, 2), tmp_path / "one.json", name="x")
    draw(simulate(one_f_one_b(2, 2)), str(tmp_path / "other.json"), name="x")
    text = (tmp_path / "one.json").read_text()
    assert text == (tmp_path / "other.json").read_text()
    assert json.loads(text)["otherData"]["title"] == "x: 2 ranks, 2 micro-batches: makespan 9, bubble 3 = 33.3%"


def test_errors(tmp_path, monkeypatch):
    table = one_f_one_b(2, 2)
    with pytest.raises(ScheduleError, match=r"must end in one of \.svg, \.png, \.json"):
        draw(table, tmp_path / "picture.jpg")
    with pytest.raises(ScheduleError, match="cannot write .*: No such file or directory"):
        draw(table, tmp_path / "nowhere" / "trace.json")
    with pytest.raises(ScheduleError, match="expected a Schedule or a Timeline"):
        draw("1f1b", tmp_path / "trace.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScheduleError, match=r"pip install 'jaxpipe\[plot\]'"):
        draw(table, tmp_path / "picture.svg")
