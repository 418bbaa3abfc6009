"""Readers beside a writer: each gets one whole checkpoint, whatever is replaced meanwhile, and whoever is killed."""

import dataclasses
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.checkpoint import read
from jaxpipe.errors import CheckpointError
from tests.engines import engine_for
from tests.models import tied

PATIENCE = 600  # seconds; far more than any machine needs


@pytest.fixture(scope="module")
def engine():
    return engine_for(tied(), 2, 2)


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
    for number, (tag, times) in enumerate([("0", 1), ("1", 1), ("1", read.TRIES - 1), ("0", 2)], start=1):
        coming = iter([10 * number + time for time in range(times)])

        def two_layers(path, made, coming=coming, tag=tag):
            first = dict(read.read_items(path, made, {"layer_001": made.layers[1].arrays}))
            for each in itertools.islice(coming, 1):
                save_number(engine, tmp_path, each, tag)
            return first | dict(read.read_items(path, made, {"layer_004": made.layers[4].arrays}))

        assert numbers_of(read.with_checkpoint(tmp_path, None, two_layers)) == {10 * number + times - 1}
    always = itertools.count(100)
    with pytest.raises(CheckpointError, match=f"found {read.TRIES} that did not"):
        read.with_checkpoint(tmp_path, None, lambda path, made: save_number(engine, tmp_path, next(always), "1"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_readers_beside_a_writer(engine, tmp_path):
    """Threads that read all the time. The writer goes on when each has finished two reads, however long that takes."""
    save_number(engine, tmp_path, 0, "0")
    found_by, failed, turn, stop = [[], []], [], threading.Condition(), threading.Event()

    def two_at_once(path, made):
        return dict(read.read_items(path, made, {f"layer_00{index}": made.layers[index].arrays for index in (1, 4)}))

    def look(found):
        try:
            while not stop.is_set():
                one = read.with_checkpoint(tmp_path, None, two_at_once)
                with turn:
                    found.append(one)
                    turn.notify()
        except BaseException as error:  # also seen by the writer, which would wait for this thread
            with turn:
                failed.append(error)
                turn.notify()

    threads = [threading.Thread(target=look, args=(found,)) for found in found_by]
    for thread in threads:
        thread.start()
    try:
        for number, tag in enumerate("0110", start=1):
            save_number(engine, tmp_path, number, tag)
            with turn:
                seen = [len(found) for found in found_by]
                done = turn.wait_for(
                    lambda seen=seen: failed or all(len(f) > n + 1 for f, n in zip(found_by, seen, strict=True)),
                    PATIENCE,
                )
            assert done, f"waited {PATIENCE} s for two reads of each thread"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed
    for found in found_by:
        assert all(len(numbers_of(one)) == 1 for one in found), "parts of several checkpoints"
        assert {1.0, 2.0, 3.0, 4.0} <= set.union(*map(numbers_of, found))


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
