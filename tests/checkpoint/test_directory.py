"""Tags, `latest`, what is kept, who writes when; disks that are full or read-only; readers beside a writer."""

import dataclasses
import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, load
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


def save_number(engine, directory, number, tag):
    """Every leaf of a checkpoint has its number; the ones before it are removed, or replaced where the tag is the same."""
    params = jax.tree.map(lambda a: jnp.full_like(a, number), engine.state.params)
    engine.state = dataclasses.replace(engine.state, params=params)
    engine.save_checkpoint(directory, tag, keep=1)


def numbers_of(found):
    return {float(a.flat[0]) for item in found.values() for name, a in item.items() if name.startswith("params")}


# A read that fails because files vanish leaves callbacks of tensorstore behind, for a loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_that_is_overtaken(engine, tmp_path):
    """The checkpoint is replaced, or removed, after a reader has read half of it: it gets one whole checkpoint."""
    save_number(engine, tmp_path, 0, "0")
    for number, (tag, times) in enumerate([("0", 1), ("1", 1), ("1", load.TRIES - 1), ("0", 2)], start=1):
        coming = iter([10 * number + time for time in range(times)])

        def two_layers(path, made, coming=coming, tag=tag):
            first = dict(load.read_items(path, made, {"layer_001": made.layers[1].arrays}))
            for each in itertools.islice(coming, 1):
                save_number(engine, tmp_path, each, tag)
            return first | dict(load.read_items(path, made, {"layer_004": made.layers[4].arrays}))

        assert numbers_of(load.with_checkpoint(tmp_path, None, two_layers)) == {10 * number + times - 1}
    always = itertools.count(100)
    with pytest.raises(CheckpointError, match=f"found {load.TRIES} that did not"):
        load.with_checkpoint(tmp_path, None, lambda path, made: save_number(engine, tmp_path, next(always), "1"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_readers_beside_a_writer(engine, tmp_path):
    """Threads that read all the time. The writer goes on when each has finished two reads, however long that takes."""
    save_number(engine, tmp_path, 0, "0")
    read, failed, turn, stop = [[], []], [], threading.Condition(), threading.Event()

    def two_at_once(path, made):
        return dict(load.read_items(path, made, {f"layer_00{index}": made.layers[index].arrays for index in (1, 4)}))

    def look(found):
        try:
            while not stop.is_set():
                one = load.with_checkpoint(tmp_path, None, two_at_once)
                with turn:
                    found.append(one)
                    turn.notify()
        except BaseException as error:  # also seen by the writer, which would wait for this thread
            with turn:
                failed.append(error)
                turn.notify()

    threads = [threading.Thread(target=look, args=(found,)) for found in read]
    for thread in threads:
        thread.start()
    try:
        for number, tag in enumerate("0110", start=1):
            save_number(engine, tmp_path, number, tag)
            with turn:
                seen = [len(found) for found in read]
                done = turn.wait_for(
                    lambda seen=seen: failed or all(len(f) > n + 1 for f, n in zip(read, seen, strict=True)), PATIENCE
                )
            assert done, f"waited {PATIENCE} s for two reads of each thread"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed
    for found in read:
        assert all(len(numbers_of(one)) == 1 for one in found), "parts of several checkpoints"
        assert {1.0, 2.0, 3.0, 4.0} <= set.union(*map(numbers_of, found))


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


WRITER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import tests.conftest
import jax, numpy as np
import jaxpipe.checkpoint.items, orbax.checkpoint
from tests.engines import *
from tests.models import tied

directory, random = {directory!r}, np.random.default_rng(0)
for number in range({kills}):
    left = int(random.integers(1, 900))  # a save takes some hundred of these

    def count(event, args):  # of what Python does to files
        global left
        if left > 0 and event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()  # so that JAX is imported once; its backends start in the child
    if child == 0:
        engine = engine_for(tied(), 1, 1)
        engine.load_checkpoint(directory)
        if engine.train_calls:
            leaves = {{float(np.asarray(leaf).flat[0]) for leaf in jax.tree.leaves(engine.state.params)}}
            assert leaves == {{float(engine.train_calls)}}, (leaves, engine.train_calls)
        print("loaded", engine.train_calls, flush=True)
        sys.addaudithook(count)
        while True:
            engine.train_calls += 1
            value = float(engine.train_calls)
            engine.state = jax.tree.map(
                lambda leaf: leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding), engine.state
            )
            tag = "same" if engine.train_calls % 3 else None
            engine.save_checkpoint(directory, tag, keep=2, blocking=number % 2 == 0)
            engine.wait_for_checkpoint()
            print("saved", engine.train_calls, flush=True)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"
    print("killed", number, flush=True)
"""


@pytest.mark.slow
def test_killed_writers_leave_a_directory_that_loads(tmp_path):
    """A writer is killed before the n-th thing that it does to files, n at random; the next one loads the last checkpoint
    that was reported, or the one after it."""
    kills, root = 12, str(Path(__file__).parents[2])
    code = WRITER.format(root=root, directory=str(tmp_path), kills=kills)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as writer:
        lines: queue.Queue[str] = queue.Queue()
        text = itertools.chain(writer.stdout, ["the end"])
        threading.Thread(target=lambda: [*map(lines.put, text)], daemon=True).start()

        def next_line(awaited):
            try:
                return lines.get(timeout=PATIENCE).split()
            except queue.Empty:
                os.killpg(writer.pid, signal.SIGKILL)
                raise AssertionError(f"kill {number}: waited {PATIENCE} s for the writer to say {awaited}") from None

        saved = 0
        for number in range(kills):
            what, loaded = next_line("what it has loaded")
            assert what == "loaded" and int(loaded) in (saved, saved + 1), (
                f"kill {number}: {saved} saved, {what} {loaded}"
            )
            saved = int(loaded)
            while (line := next_line("that it has saved, or was killed"))[0] == "saved":
                saved = int(line[1])
            assert line == ["killed", str(number)]
    assert writer.returncode == 0 and saved > 5
