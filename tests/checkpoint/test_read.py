"""A checkpoint that is replaced while it is read is read again; what is wrong with one that stays is told."""

import pytest

from jaxpipe.checkpoint import read
from jaxpipe.errors import CheckpointError
from tests.checkpoint.crowd import crowd
from tests.checkpoint.states import state, write

OF, _ = state()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write(directory, "a", OF)
    return directory


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path):
    write(tmp_path, "a", OF)
    tries = []

    def use(path, made):
        tries.append(made.id)
        if len(tries) < 3:
            write(tmp_path, "a", OF)
        return made.id

    assert read.with_checkpoint(tmp_path, None, use) == tries[-1] and len(set(tries)) == 3

    def always(path, made):
        write(tmp_path, "a", OF)

    with pytest.raises(CheckpointError, match=f"found {read.TRIES} that did not"):
        read.with_checkpoint(tmp_path, "a", always)


def test_errors_of_a_checkpoint_that_stays_are_raised(directory):
    def use(path, made):
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="^damaged$"):
        read.with_checkpoint(directory, None, use)
    assert read.with_checkpoint(directory / "nowhere", None, use) is None


def test_processes_read_one_and_the_same(tmp_path, monkeypatch):
    """One of them finds that the checkpoint was replaced, so all read the new one."""
    monkeypatch.setattr(read, "PAUSE", 0.0)
    write(tmp_path, "a", OF)
    tries = []

    def use(group):
        def once(path, made):
            tries.append(group.me)
            if group.me == 1 and tries.count(1) == 1:
                write(tmp_path, "b", OF)
                write(tmp_path, "a", OF)
            return made.id

        return once

    ids = crowd(3, lambda group: read.with_checkpoint(tmp_path, None, use(group), group))
    assert len(set(ids)) == 1 and sorted(tries) == [0, 0, 1, 1, 2, 2]
    assert crowd(2, lambda group: read.with_checkpoint(tmp_path / "nowhere", None, use(group), group)) == [None, None]


@pytest.mark.parametrize("error", [CheckpointError("damaged"), KeyError("bug")])
def test_if_one_process_cannot_read_none_has_read(directory, error):
    def use(group):
        def once(path, made):
            if group.me == 1:
                raise error
            return made

        return once

    found = crowd(2, lambda group: read.with_checkpoint(directory, "a", use(group), group))
    assert found[1] is error and str(error) in str(found[0]) and str(found[0]).startswith("Process 1")


def test_a_directory_that_not_all_see(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "PAUSE", 0.0)
    places = [directory, tmp_path]
    found = crowd(2, lambda group: read.with_checkpoint(places[group.me], "a", lambda path, made: made, group))
    assert str(found[0]) == f"Process 1: {tmp_path}: expected the tag 'a', found no checkpoint at all."
    missing = crowd(2, lambda group: read.with_checkpoint(directory, "z", lambda path, made: made, group))
    assert {str(each) for each in missing} == {f"{directory}: expected the tag 'z', found a."}
