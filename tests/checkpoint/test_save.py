"""Writing: item after item, all or nothing, at once or from a copy."""

import threading

import jax
import numpy as np
import pytest

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest, save
from jaxpipe.errors import CheckpointError
from jaxpipe.processes.group import Group
from tests.checkpoint.states import COUNTERS, homes, manifest_of, order, state, write
from tests.optimizer.layouts import mesh

OF, _ = state()
GROUP = Group.of(mesh())


def test_the_manifest_says_what_there_is():
    made = manifest_of(OF)
    assert [(layer.name, layer.tied_to) for layer in made.layers][:3] == [
        ("Embed", None),
        ("tanh", None),
        ("Block", None),
    ]
    assert made.layers[3].arrays == homes(OF).expected(OF)["layer_003"]
    assert (made.step, made.partition, made.mesh) == (0, [0, 3, 6], {"pipe": 2, "data": 1})
    assert {name: getattr(made, name) for name in COUNTERS} == COUNTERS
    assert made.config["remat"] == "layer" and made.versions["jax"] == jax.__version__ and "fry" in made.key_impl
    assert made.id != manifest_of(OF).id, "of this very save"


def test_written_and_pruned(tmp_path):
    for tag in ("a", "b", "c"):
        assert write(tmp_path, tag, OF, keep=2) == tmp_path / tag
    assert folders.tags(tmp_path) == ["b", "c"] and folders.latest(tmp_path) == "c"
    write(tmp_path, "d", OF, save_latest=False)
    assert folders.latest(tmp_path) == "c"
    folder = tmp_path / "c"
    files = {path for path in folder.rglob("*") if path.is_file()} - {folder / "checkpoint.json"}
    assert manifest.read(folder).files == {str(path.relative_to(folder)): path.stat().st_size for path in files}


def test_items_are_asked_for_one_after_the_other(tmp_path, monkeypatch):
    events = []
    real = items.write

    def write_item(path, arrays):
        events.append(f"wrote {path.name}")
        real(path, arrays)

    monkeypatch.setattr(items, "write", write_item)

    def source():
        for item, arrays in homes(OF).items(OF):
            events.append(f"made {item}")
            yield item, arrays

    save.Saver().start(order(tmp_path, "a"), manifest_of(OF), source(), GROUP)
    assert events[:4] == ["made layer_000", "wrote layer_000", "made layer_002", "wrote layer_002"]


def fail(*_):
    raise OSError(28, "No space left on device")


def test_a_failure_leaves_nothing_and_is_told(tmp_path, monkeypatch):
    write(tmp_path, "good", OF)
    monkeypatch.setattr(items, "write", fail)
    with pytest.raises(CheckpointError, match="bad: .* written: OSError: No space left on device. Make room"):
        write(tmp_path, "bad", OF)
    assert (
        folders.tags(tmp_path) == ["good"] and folders.latest(tmp_path) == "good" and not list(tmp_path.glob(".new*"))
    )


def test_in_the_background_a_copy_is_written_and_a_failure_told_later(tmp_path, monkeypatch):
    go, real = threading.Event(), items.write
    monkeypatch.setattr(items, "write", lambda *args: go.wait() and real(*args))
    saver, (mine, _) = save.Saver(), state(3)
    wanted = np.asarray(mine.params["shared"]["0_Embed"]["e"])
    saver.start(order(tmp_path, "a", blocking=False), manifest_of(mine), homes(mine).items(mine), GROUP)
    jax.tree.map(lambda leaf: leaf.delete(), mine)  # training goes on, and uses the state up
    assert folders.tags(tmp_path) == []
    go.set()
    saver.wait()
    found = items.read(tmp_path / "a" / "layer_000", lambda name: name == "params/e")
    np.testing.assert_array_equal(found["params/e"], wanted)
    monkeypatch.setattr(items, "write", fail)
    saver.start(order(tmp_path, "b", blocking=False), manifest_of(OF), homes(OF).items(OF), GROUP)
    with pytest.raises(CheckpointError, match="b: the checkpoint could not be written: OSError: No space left"):
        saver.wait()
    saver.wait()
