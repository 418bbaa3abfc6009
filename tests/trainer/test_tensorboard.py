import struct
import sys

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.trainer.tensorboard import TensorBoard
from tests.trainer.runs import FakeRun, result


@pytest.fixture
def event_pb2(monkeypatch):
    if "tensorboardX" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torch", None)  # it would import torch where there is one, which takes long
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    return event_pb2


def events(path, event_pb2):
    """The events of a file: records of a length (8 bytes), its checksum (4), that many bytes, and their checksum (4)."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
        at += length + 16
    return found


def scalars(found):
    return [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]


def test_the_event_files_have_what_was_written(tmp_path, event_pb2):
    board, run = TensorBoard(tmp_path / "board"), FakeRun()
    board.on_start(run)
    board.on_step(run, 1, {"loss": 2.5, "grad_norm": 0.5})
    board.on_evaluate(run, 1, {"loss": 4.0})
    board.on_step(run, 2, {"loss": 1.5})
    board.on_end(run, result())
    (path,) = (tmp_path / "board").iterdir()
    found = events(path, event_pb2)
    assert scalars(found) == [
        (1, "train/loss", 2.5),
        (1, "train/grad_norm", 0.5),
        (1, "eval/loss", 4.0),
        (2, "train/loss", 1.5),
    ]
    assert found[0].file_version == "brain.Event:2" and all(event.wall_time > 1.7e9 for event in found)


def test_a_run_that_goes_on_makes_later_steps_void(tmp_path, event_pb2):
    board, run = TensorBoard(tmp_path), FakeRun(began=3)
    board.on_start(run)
    board.on_step(run, 4, {"loss": 1.0})
    board.on_end(run, result())
    (path,) = tmp_path.iterdir()
    starts = [e.step for e in events(path, event_pb2) if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [4]


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxpipe\[tensorboard\]'"):
        TensorBoard(tmp_path)
