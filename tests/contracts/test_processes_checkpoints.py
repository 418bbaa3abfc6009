"""Checkpoints of several processes: whoever saves and whoever loads, the bits are the same; all succeed, or nobody does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.on_disk import arrays_of, assert_identical
from tests.contracts.launched import LIMIT, ROOT, launched
from tests.contracts.processes_checkpoints import engine_on, steps

SCRIPT = "processes_checkpoints.py"


@pytest.mark.slow
def test_saved_by_one_two_and_four_and_loaded_by_the_others(tmp_path):
    alone = engine_on(3, 2)
    steps(alone, 1)
    alone.save_checkpoint(tmp_path, "one")
    first, second = launched(SCRIPT, 2, 2, "two", tmp_path)
    # The same bits, whoever wrote them.
    two = arrays_of(tmp_path / "two")
    assert_identical(arrays_of(tmp_path / "again"), arrays_of(tmp_path / "one"), "one process, two processes")
    assert_identical(arrays_of(tmp_path / "background"), two, "in the background")
    assert_identical(arrays_of(tmp_path / "crossed"), two, "data ranks on both processes")
    for name in ("client_state", "reader", "steps", "losses", "crossed", "resumed", "after", "missing", "different"):
        assert first[name] == second[name], name
    assert (first["client_state"], first["reader"], first["steps"]) == ({"from": 0}, 7, [4, 4, 12])
    assert first["resumed"] == first["losses"], "digit by digit"
    np.testing.assert_allclose(first["crossed"], first["losses"], rtol=1e-6)
    # All raise, and nothing is left.
    for name in ("full", "full later"):
        assert re.match(rf"{tmp_path}/full: .*OSError: No space left on device. Make room", second[name])
        assert first[name] == f"Process 1: {second[name]}"
    assert first["missing"].startswith(f"{tmp_path}: expected the tag 'missing', found one, again, two, background")
    assert f"directory='{tmp_path}/1' on process 1: expected the same" in first["different"]
    assert second["in the way"] == f"Process 0: {first['in the way']}" and "FileExistsError" in first["in the way"]
    assert (first["nowhere"], second["nowhere"]) == ([[None, None], 1], [[None, None], 0]), "one warning"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "again", "two", "background", "crossed", "latest"}
    # Four processes, and one again.
    quarters = launched(SCRIPT, 4, 1, "four", tmp_path)
    assert_identical(arrays_of(tmp_path / "four"), two, "four processes")
    assert all(each["losses"] == quarters[0]["losses"] for each in quarters)
    assert all(
        "the data iterators of 2 processes, which stood at different places" in each["data"] for each in quarters
    )
    alone = engine_on(4, 1)
    assert alone.load_checkpoint(tmp_path)[0] == str(tmp_path / "four")
    np.testing.assert_allclose(steps(alone, 2), quarters[0]["losses"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_layers_of_memory_are_enough(tmp_path, monkeypatch):
    """On top of the own state, however many layers there are; a load holds a copy of the own state, too."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")  # what is freed is not counted
    for found in launched(SCRIPT, 2, 2, "memory", tmp_path):
        assert 0.1 < found["save"] < 2 and found["own"] < found["load"] < found["own"] + 2, found


LAUNCH = """
from jaxpipe.cli import main
from jaxpipe.processes import launch
launch.GRACE = 0.5
raise SystemExit(main())
"""


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_goes_on_with_the_same_digits(tmp_path):
    """Each process once, while it saves; the run is started again, and loads what `latest` names."""
    kills = [[1, 150], [0, 160]]  # two saves take process 0 some 240 uses of files, and process 1 some 110
    options = ["launch", "-n", "2", "--devices-per-process", "2", "--restarts", str(len(kills))]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LAUNCH,
            *options,
            ROOT / "tests" / "contracts" / SCRIPT,
            "killed",
            str(tmp_path),
            "6",
            json.dumps(kills),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("ended by signal 9") == 2
    for line in re.findall(r"\] found (.*)", done.stdout):
        found = json.loads(line)
        assert 0 < found["begun"] < 6 and found["losses"] == found["uninterrupted"][found["begun"] :]


# Two processes that write files in the place of arrays, forked so that hundreds of them can be killed.
PAIR = """
import dataclasses, json, os, signal, socket, sys, time
from pathlib import Path
from jaxpipe.checkpoint import directory as folders, items, together, verify
from jaxpipe.checkpoint.write import Order
from jaxpipe.processes.group import Group
from tests.checkpoint.manifests import MADE
from tests.contracts.processes_checkpoints import count_down

directory = Path(sys.argv[1])
folders.UNTOUCHED = 0.0
verify.check_written = lambda *_: None

class Pair(Group):
    def __init__(self, me, wire):
        self.members, self.several, self.me, self.first = (0, 1), True, me, me == 0
        self.coming, self.going = wire.makefile("r"), wire.makefile("w")
    def gather(self, value):
        print(json.dumps(value), file=self.going, flush=True)
        line = self.coming.readline()
        if not line:
            os._exit(3)  # the other one is dead
        other = json.loads(line)
        return [value, other] if self.first else [other, value]

def write(path, arrays):
    path.mkdir()
    (path / "data").write_text(arrays["text"])

items.write = write

def save(me, wire, number):
    group = Pair(me, wire)
    order = Order(directory, f"tag{number % 2}", True, 2, True)
    source = ((f"layer_{index:03d}", {"text": "x" * number}) for index in range(me, 6, 2))
    together.begin(group, order, dataclasses.replace(MADE, train_calls=number)).run(source)

def pair(number, victim, after):
    wires, children = socket.socketpair(), []
    for me in range(2):
        child = os.fork()
        if child == 0:
            wires[1 - me].close()
            if me == victim:
                count_down(after, directory)
            try:
                save(me, wires[me], number)
            except BaseException as error:
                print(me, repr(error), flush=True)
                os._exit(4)
            os._exit(0)
        children.append(child)
    for wire in wires:
        wire.close()
    if victim is not None:
        dead = os.WIFSIGNALED(os.waitpid(children[victim], 0)[1])
        if dead:  # what the heartbeats do, sooner or later
            time.sleep(0.02 * (number % 3))
            os.kill(children[1 - victim], signal.SIGKILL)
        os.waitpid(children[1 - victim], 0)
        return dead
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]

def check(*allowed):
    tag = folders.latest(directory)
    path = folders.find(directory, tag)
    found = folders.manifest.read(path)
    assert found.train_calls in allowed, (found.train_calls, allowed)
    assert sorted(found.files) == [f"layer_{index:03d}/data" for index in range(6)]
    for name in found.files:
        assert (path / name).read_text() == "x" * found.train_calls, name
    return found.train_calls

pair(1, None, 0)
number = saved = check(1)
kills = [0, 0]
for victim in range(2):
    dead, after = True, 0
    while dead:
        after += 1
        number += 1
        dead = pair(number, victim, after)
        if not dead:
            saved = number
        saved = check(saved, number)
        kills[victim] += dead
pair(number + 1, None, 0)
check(number + 1)
print(kills, sorted(path.name for path in directory.iterdir()))
"""


@pytest.mark.slow
def test_killed_at_any_use_of_files(tmp_path):
    """One of two processes is killed before the n-th thing that it does to files, for every n: `latest` stays complete."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", PAIR, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=LIMIT
    )
    assert run.returncode == 0, run.stdout + run.stderr
    kills, left = re.fullmatch(r"(.*\]) (\[.*)\n", run.stdout.splitlines(keepends=True)[-1]).groups()
    assert min(json.loads(kills)) > 10
    assert left == "['.replaced', 'latest', 'tag0', 'tag1']"
