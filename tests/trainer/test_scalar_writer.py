import numpy as np
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.trainer.scalar_writer import ScalarWriter
from tests.trainer.runs import FakeRun, result


class Recorder(ScalarWriter):
    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def open(self, run):
        self.calls.append("open")

    def write(self, step, values):
        self.calls.append((step, values))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def run_through(writer, run):
    writer.on_start(run)
    for step in range(1, 5):
        writer.on_step(run, step, {"loss": step / 2, "each": np.ones(3)})
    writer.on_evaluate(run, 3, {"loss": 7.0, "rows": np.ones(2)})
    writer.on_checkpoint(run, 3, "run/global_step3")
    writer.on_end(run, result())
    return writer.calls


def test_scalars_are_written_by_name():
    assert run_through(Recorder(every=2), FakeRun()) == [
        "open",
        (2, {"train/loss": 1.0}),
        (4, {"train/loss": 2.0}),
        (3, {"eval/loss": 7.0}),
        "flush",
        "flush",
        "close",
    ]


def test_only_one_process_writes():
    assert run_through(Recorder(), FakeRun(writes=False)) == []


def test_the_cadence_is_checked():
    with pytest.raises(ConfigError, match=r"Recorder: every=0 must be an integer, 1 or more"):
        Recorder(every=0)
