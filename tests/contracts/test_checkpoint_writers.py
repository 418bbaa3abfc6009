"""Tags, `latest`, what is kept; disks that are full or read-only; writers that die."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items
from jaxpipe.errors import CheckpointError
from tests.compare import assert_close
from tests.engines import M, batches, engine_for, stream
from tests.models import tied

PATIENCE = 600  # seconds; far more than any machine needs


@pytest.fixture(scope="module")
def engine():
    return engine_for(tied(), 2, 2)


@pytest.fixture(scope="module")
def reader():
    return engine_for(tied(), 1, 1, key=jax.random.key(77))


def step(engine):
    engine.train_batch(stream(batches(1, first=engine.train_calls)))


def test_tags_and_what_is_kept(engine, reader, tmp_path):
    first = engine.global_steps
    for _ in range(4):
        engine.save_checkpoint(tmp_path, keep=2)
        step(engine)
    assert folders.tags(tmp_path) == [f"global_step{first + 2}", f"global_step{first + 3}"]
    assert (tmp_path / "latest").read_text() == f"global_step{first + 3}\n"
    engine.save_checkpoint(tmp_path, "best", save_latest=False, client_state={"loss": 1.5})
    assert reader.load_checkpoint(tmp_path)[0] == str(tmp_path / f"global_step{first + 3}")
    assert reader.load_checkpoint(str(tmp_path), "best") == (str(tmp_path / "best"), {"loss": 1.5})
    assert_close(reader.to_layers(), jax.device_get(engine.to_layers()), 0)
    # `latest` is not removed, however old it is.
    engine.save_checkpoint(tmp_path, "other", save_latest=False, keep=1)
    assert set(folders.tags(tmp_path)) == {f"global_step{first + 3}", "other"}
    step(engine)
    engine.save_checkpoint(tmp_path, "other")  # replaced
    reader.load_checkpoint(tmp_path)
    assert_close(reader.to_layers(), jax.device_get(engine.to_layers()), 0)
    assert {path.name for path in tmp_path.iterdir()} == {f"global_step{first + 3}", "other", "latest", ".replaced"}
    assert not list((tmp_path / ".replaced").iterdir())


class Counter:
    """An iterator that knows where it stands, as grain's do."""

    def __init__(self, encode=lambda at: {"at": at}, decode=lambda state: state["at"]):
        self.at, self.encode, self.decode = 0, encode, decode

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return tuple(a[0] for a in batches(1, first=self.at)[0])

    def get_state(self):
        return self.encode(self.at)

    def set_state(self, state):
        self.at = self.decode(state)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_position_in_the_data(engine, reader, tmp_path, as_bytes):
    coding = (lambda at: b"\xff" * at, len) if as_bytes else ()
    data, again = Counter(*coding), Counter(*coding)
    seen = engine.micro_batches_seen
    engine.train_batch(data)
    engine.save_checkpoint(tmp_path, data_iter=data)
    reader.load_checkpoint(tmp_path, data_iter=again)
    assert again.at == data.at == M
    assert reader.micro_batches_seen == engine.micro_batches_seen == seen + M


def test_in_the_background(engine, reader, tmp_path, monkeypatch):
    """What is written is the state at the time of the call, whatever happens meanwhile; one checkpoint at a time."""
    go, write = threading.Event(), items.write
    monkeypatch.setattr(items, "write", lambda *args: go.wait() and write(*args))
    before = jax.device_get(engine.to_layers())
    path = Path(engine.save_checkpoint(tmp_path, "early", blocking=False))
    step(engine)
    assert not path.exists() and not (tmp_path / "latest").exists()
    go.set()
    engine.save_checkpoint(tmp_path, "late", blocking=False)
    assert path.exists(), "the second waits for the first"
    engine.wait_for_checkpoint()
    assert folders.latest(tmp_path) == "late"
    reader.load_checkpoint(tmp_path, "early")
    assert_close(reader.to_layers(), before, 0)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(items, "write", fail)
    engine.save_checkpoint(tmp_path, "failed", blocking=False)
    step(engine)
    engine.load_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"failed: the checkpoint could not be written: OSError: No space left on"
    ):
        engine.wait_for_checkpoint()
    engine.wait_for_checkpoint()
    assert folders.tags(tmp_path) == ["early", "late"] and not list(tmp_path.glob(".new*"))


def test_places_that_cannot_be_written(engine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written: NotADirectoryError: .*Not a directory"):
        engine.save_checkpoint(tmp_path / "file" / "run")
    step(engine)


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {root!r})
import tests.conftest
from pathlib import Path
from jaxpipe.errors import CheckpointError
from tests.engines import *
from tests.models import tied
engine = engine_for(tied(), 2, 1)
engine.save_checkpoint({directory!r}, "good")
engine.train_batch(stream(batches(1)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    engine.save_checkpoint({directory!r}, "bad")
except CheckpointError as error:
    print(error)
engine.train_batch(stream(batches(1)))
engine.load_checkpoint({directory!r})
print(engine.global_steps, sorted(path.name for path in Path({directory!r}).iterdir()))
"""


def test_a_disk_that_takes_no_more(tmp_path):
    """A limit on the size of files stands for a full disk: writes fail in the same places."""
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", LIMITED.format(root=root, directory=str(tmp_path))], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    message, last = run.stdout.splitlines()
    assert message.startswith(f"{tmp_path}/bad: the checkpoint could not be written: ") and "File too large" in message
    assert last == "0 ['good', 'latest']"


def test_left_over_drafts_are_removed(engine, tmp_path):
    """Those of writers that are dead, and no others."""
    host = folders._hidden(tmp_path).name.split(".", 4)[4]
    dead = [f".new.999999999.0.{host}", f".new.{os.getpid()}.0.{host}"]
    others = [".new.999999999.0.elsewhere", f".new.{os.getppid()}.0.{host}", f".new.999999999.1.{host}"]
    for name in dead + others:
        (tmp_path / name / "layer_000").mkdir(parents=True)
        if name != others[2]:  # touched just now: perhaps of a process of another container
            for path in (tmp_path / name / "layer_000", tmp_path / name):
                os.utime(path, (1, 1))
    engine.save_checkpoint(tmp_path, "a")
    assert {path.name for path in tmp_path.glob(".new*")} == set(others)


def test_a_replacement_that_was_cut_off_is_put_right(engine, tmp_path):
    """A writer that died before, or after, the former checkpoint of a tag made room."""
    engine.save_checkpoint(tmp_path, "best", client_state={"n": 1})
    (tmp_path / ".replaced").mkdir()
    (tmp_path / "best").rename(tmp_path / ".replaced" / "best")
    assert folders.tags(tmp_path) == ["best"]
    assert engine.load_checkpoint(tmp_path)[1] == {"n": 1}
    engine.save_checkpoint(tmp_path, "other", save_latest=False)
    assert (tmp_path / "best").exists() and not list((tmp_path / ".replaced").iterdir())
    shutil.copytree(tmp_path / "best", tmp_path / ".replaced" / "best")
    engine.save_checkpoint(tmp_path, "best", client_state={"n": 2})
    assert not list((tmp_path / ".replaced").iterdir())
    assert engine.load_checkpoint(tmp_path)[1] == {"n": 2}


LAST = """
import sys
sys.path.insert(0, {root!r})
import tests.conftest
from tests.engines import *
from tests.models import tied
engine, state = engine_for(tied(), 2, 1), {{"epoch": 1}}
engine.save_checkpoint({directory!r}, "first", client_state=state, blocking=False)
state["epoch"] = {{2, 3}}
engine.wait_for_checkpoint()
engine.save_checkpoint({directory!r}, "last", blocking=False)
"""


def test_the_end_of_a_program(tmp_path, reader):
    """It does not wait for a checkpoint in the background, and that is said; the one before is there, as it was given."""
    code = LAST.format(root=str(Path(__file__).parents[2]), directory=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "last" not in folders.tags(tmp_path):  # it may have been fast enough
        assert "The program ended meanwhile: call engine.wait_for_checkpoint() before its end" in run.stderr
    assert reader.load_checkpoint(tmp_path, "first")[1] == {"epoch": 1}
