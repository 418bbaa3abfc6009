import json
import math

from jaxpipe.trainer.json_lines import JsonLines
from tests.trainer.runs import FakeRun, result


def write(path, steps, began=0, at_evaluation=lambda: None):
    lines, run = JsonLines(path), FakeRun(began=began)
    lines.on_start(run)
    for step in steps:
        lines.on_step(run, step, {"loss": 1 / step})
    lines.on_evaluate(run, steps[-1], {"loss": math.nan, "hits": 3})
    at_evaluation()
    lines.on_end(run, result())


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    write(path, [1, 2])
    found = read(path)
    assert all(line.pop("time") > 1.7e9 for line in found)
    assert found[:2] == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert found[2] == {"step": 2, "eval/loss": None, "eval/hits": 3.0}


def test_a_run_that_goes_on_writes_no_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [1, 2, 3, 4])
    with path.open("a") as file:
        file.write('{"step": 5, "tra')  # the writer was killed
    write(path, [3, 4, 5], began=2)
    assert [line["step"] for line in read(path) if "train/loss" in line] == [1, 2, 3, 4, 5]
    write(path, [1], began=0)
    assert [line["step"] for line in read(path)] == [1, 1], "a run that begins anew begins the file anew"


def test_evaluations_can_be_read_at_once(tmp_path):
    path, seen = tmp_path / "log.jsonl", []
    write(path, [1], at_evaluation=lambda: seen.extend(read(path)))
    assert len(seen) == 2
