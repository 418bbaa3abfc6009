"""Several processes, which are threads here: they all write one checkpoint, or none does."""

import itertools

import pytest

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, manifest, together, verify, write
from jaxpipe.errors import CheckpointError
from tests.checkpoint.crowd import crowd
from tests.checkpoint.states import homes, manifest_of, order, state

OF, _ = state()
ITEMS = dict(homes(OF).items(OF))
REASON = "No space left on device. Make room, or save somewhere else. Earlier"


def full(*_):
    raise OSError(28, "No space left on device")


def saved_by(count, asked, write_item=None, blocking=True, drained=None):
    """What each of so many processes returns or raises that write every item once, in turn."""

    def work(group):
        def source():
            yield from itertools.islice(ITEMS.items(), group.me, None, count)
            if drained is not None:
                drained.append(group.me)

        share = together.begin(group, asked, manifest_of(OF))
        if write_item is not None:
            share._write = write_item(group, share._write)
        return share.run(source() if blocking else share.copy(source()))

    return crowd(count, work)


def fails_on(*members, error=full):
    return lambda group, real: error if group.me in members else real


def check_nothing_changed(directory):
    assert folders.latest(directory) == "good"
    assert {path.name for path in directory.iterdir()} == {"good", "latest"}


@pytest.fixture
def run(tmp_path):
    assert saved_by(2, order(tmp_path, "good")) == [tmp_path / "good"] * 2
    return tmp_path


@pytest.mark.parametrize("blocking", [True, False])
def test_each_writes_its_share(tmp_path, blocking):
    asked = order(tmp_path, "a", blocking=blocking)
    assert saved_by(3, asked, blocking=blocking) == [tmp_path / "a"] * 3
    made = manifest.read(tmp_path / "a")
    assert made.files == {n: s for n, s in write.files_in(tmp_path / "a").items() if n != manifest.NAME}
    assert {name.split("/")[0] for name in made.files} == ITEMS.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "latest"}, "no draft, and no board"
    for tag in "bc":
        saved_by(2, order(tmp_path, tag, keep=2, save_latest=tag == "c"))
    assert folders.tags(tmp_path) == ["b", "c"] and folders.latest(tmp_path) == "c"


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_if_one_cannot_write_none_has(run, culprit, blocking):
    drained = []
    found = saved_by(3, order(run, "bad"), fails_on(culprit), blocking, drained)
    own = f"{run}/bad: the checkpoint could not be written: OSError: {REASON}"
    for member, error in enumerate(found):
        assert type(error) is CheckpointError
        assert str(error).startswith(own if member == culprit else f"Process {culprit}: {own}")
    assert sorted(drained) == [0, 1, 2], "a source contains collectives"
    check_nothing_changed(run)


def test_two_culprits_and_a_source_that_fails(run):
    found = saved_by(3, order(run, "bad"), fails_on(1, 2))
    assert [str(error).startswith("Process 1") for error in found] == [True, False, False]

    def source(group):
        yield from itertools.islice(ITEMS.items(), group.me)
        raise RuntimeError("lost a device")

    found = crowd(2, lambda group: together.begin(group, order(run, "bad"), manifest_of(OF)).run(source(group)))
    assert all("RuntimeError: lost a device" in str(error) for error in found)
    check_nothing_changed(run)


@pytest.mark.parametrize(
    ("where", "name", "message"),
    [
        (verify, "check_written", "the checkpoint could not be written: OSError: No space left"),
        (folders.Draft, "commit", "the checkpoint could not be written: OSError: No space left"),
        (folders, "point_latest", "the checkpoint was written, but 'latest' or the older ones"),
    ],
)
def test_the_first_one_fails_at_the_end(run, monkeypatch, where, name, message):
    monkeypatch.setattr(where, name, full)
    found = saved_by(2, order(run, "bad"))
    assert message in str(found[0]) and str(found[1]) == f"Process 0: {found[0]}"
    assert folders.latest(run) == "good" and not list(run.glob(".new*"))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = saved_by(2, order(tmp_path / "file" / "run", "a"))
    assert "NotADirectoryError" in str(found[0]) and str(found[1]) == f"Process 0: {found[0]}"


def test_a_place_that_not_all_see(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "SIGHT", 0.0)

    def work(group):
        return together.begin(group, order(tmp_path / str(group.me), "a"), manifest_of(OF)).run([])

    found = crowd(2, work)
    assert f"{tmp_path}/1: the first process has made a folder there, which process 1 does not see" in str(found[0])
    assert str(found[0]) == f"Process 1: {found[1]}" and not list((tmp_path / "0").iterdir())


def test_files_that_the_first_one_does_not_see(run, monkeypatch):
    real = together.files_in
    monkeypatch.setattr(together, "files_in", lambda *a: {name: size + 1 for name, size in real(*a).items()})
    found = saved_by(2, order(run, "bad"))
    assert "bad: process 1 has written" in str(found[0]) and "a file system that all processes share" in str(found[1])
    check_nothing_changed(run)


def test_one_that_ends_without_a_word(run):
    def vanishes(group, real):
        def write_item(name, arrays):
            next(run.glob(".new.*/process_1")).unlink()
            raise SystemExit

        return write_item if group.me == 1 else real

    def work(group):
        share = together.begin(group, order(run, "bad"), manifest_of(OF))
        share._write = vanishes(group, share._write)
        try:
            return share.run(itertools.islice(ITEMS.items(), group.me, None, 3))
        except SystemExit:
            return "left"

    told, left, _ = found = crowd(3, work)
    assert left == "left" and str(told) == str(found[2]) == "Process 1: it ended, or could not write any more."
    check_nothing_changed(run)


def test_writing_ends_early_when_the_first_one_has_given_up(run, monkeypatch):
    """The second one begins when the first one has said so."""
    written, real = [], items.write
    monkeypatch.setattr(items, "write", lambda path, arrays: written.append(path.name) or real(path, arrays))

    def late(group, write_item):
        def when_told(*item):
            while share_of[group.me]._board.read(0).state != "failed":
                pass
            write_item(*item)

        return full if group.me == 0 else when_told

    share_of = {}

    def work(group):
        share_of[group.me] = share = together.begin(group, order(run, "bad"), manifest_of(OF))
        share._write = late(group, share._write)
        return share.run(itertools.islice(ITEMS.items(), group.me, None, 2))

    found = crowd(2, work)
    assert str(found[1]) == f"Process 0: {found[0]}" and not written
    check_nothing_changed(run)
