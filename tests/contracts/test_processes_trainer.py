"""A `Trainer` in two processes: they take the same decisions, and one of them writes."""

import json

import pytest

import jaxpipe
from jaxpipe.callbacks import History
from tests.contracts import processes_trainer as script
from tests.contracts.launched import launched


@pytest.mark.slow
def test_processes_end_together_and_one_writes(tmp_path):
    first, second = launched("processes_trainer.py", 2, 2, tmp_path)
    history = History()
    jaxpipe.Trainer(script.make_engine(), script.data(script.STEPS), callbacks=[history]).run()
    steps, losses = history.curve("loss")

    short, again, asked = first["data"], first["again"], first["asked"]
    assert short["ended"] == second["data"]["ended"] == "data" and short["step"] == second["data"]["step"] == 5
    assert "process 1 has no more data" in short["reason"] and "data_iter ended" in second["data"]["reason"]
    assert short["losses"][0] == steps[:5], "the step that process 0 began is told to nobody"
    # The next run has what was missing, and makes that step alone.
    assert again["step"] == 6 and again["losses"][0] == steps == second["again"]["losses"][0]
    assert again["losses"][1] == second["again"]["losses"][1] == pytest.approx(losses, rel=1e-6)
    assert again["evaluation"] == second["again"]["evaluation"]
    assert asked == second["asked"] and (asked["ended"], asked["step"]) == ("stopped", 8)
    assert asked["reason"] == "process 1 has had enough"

    assert [first["data"]["opened"], second["data"]["opened"]] == [True, False]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == steps
