import sys
import types

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.trainer.weights_and_biases import WandB
from tests.trainer.runs import FakeRun, result


class FakeWandb(types.ModuleType):
    """Records what it is asked for; takes what the real one takes."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, project=None, name=None, id=None, resume=None):
        self.calls.append({"project": project, "name": name, "id": id, "resume": resume})
        self.id = id or "made"
        return self

    def define_metric(self, name, step_metric=None):
        self.calls.append((name, step_metric))

    def log(self, data):
        self.calls.append(data)

    def finish(self):
        self.calls.append("finish")


def test_a_run_is_logged_and_goes_on_under_its_id(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    first, run = WandB(project="gpt", name="first"), FakeRun()
    first.on_start(run)
    first.on_step(run, 1, {"loss": 2.0})
    first.on_evaluate(run, 1, {"loss": 3.0})
    first.on_end(run, result())
    assert fake.calls == [
        {"project": "gpt", "name": "first", "id": None, "resume": None},
        ("*", "step"),
        {"step": 1, "train/loss": 2.0},
        {"step": 1, "eval/loss": 3.0},
        "finish",
    ]
    again = WandB(project="gpt")
    again.set_state(first.get_state())
    again.on_start(FakeRun(began=1))
    assert fake.calls[5] == {"project": "gpt", "name": None, "id": "made", "resume": "allow"}


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxpipe\[wandb\]'"):
        WandB(project="gpt")
