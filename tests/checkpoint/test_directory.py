"""Tags, `latest`, drafts and replacements: files only, without an engine."""

import os
from pathlib import Path

import pytest

from jaxpipe.checkpoint import directory as folders
from jaxpipe.errors import CheckpointError
from tests.checkpoint.manifests import MADE, save


@pytest.mark.parametrize("directory", [None, 5, b"run", "", "a\0b", "gs://bucket/run"])
def test_what_is_no_path(directory):
    with pytest.raises(CheckpointError, match="directory="):
        folders.as_directory(directory)


def test_paths_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folders.as_directory("run [a]") == tmp_path / "run [a]"
    assert folders.as_directory(Path("~/run")) == tmp_path / "home" / "run"
    assert folders.as_directory("~nobody-of-this-name") == tmp_path / "~nobody-of-this-name"


@pytest.mark.parametrize("tag", ["", "a/b", ".hidden", "latest", 3, " a", "a\n", "x" * 201, None])
def test_what_is_no_tag(tag):
    with pytest.raises(CheckpointError, match="tag=.*: expected the name of a folder"):
        folders.check_tag(tag)


@pytest.mark.parametrize("tag", ["global_step5", "[a]", "a b", "日本", "x" * 200])
def test_tags(tag, tmp_path):
    assert folders.check_tag(tag) == tag
    assert save(tmp_path, tag) == folders.find(tmp_path, tag) == tmp_path / tag
    assert folders.tags(tmp_path) == [tag]


def test_the_order_of_tags_is_that_of_saving(tmp_path):
    for step, tag in enumerate(["c", "a", "b"]):
        save(tmp_path, tag, step)
    (tmp_path / "other").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.json").write_text("{")
    assert folders.tags(tmp_path) == ["c", "a", "b"]
    with pytest.raises(CheckpointError, match="expected the tag 'bb', found c, a, b. Did you mean 'b'"):
        folders.find(tmp_path, "bb")
    with pytest.raises(CheckpointError, match="expected the tag 'x', found no checkpoint at all"):
        folders.find(tmp_path / "nowhere", "x")


def test_latest(tmp_path):
    assert folders.latest(tmp_path) is None and folders.latest(tmp_path / "nowhere") is None
    folders.point_latest(tmp_path, "a b")
    assert folders.latest(tmp_path) == "a b" and (tmp_path / "latest").read_text() == "a b\n"
    for content in (b"../elsewhere", b"", b"\xff\xfe"):
        (tmp_path / "latest").write_bytes(content)
        with pytest.raises(CheckpointError, match="latest: expected a tag in this file, found: "):
            folders.latest(tmp_path)


def test_without_a_commit_nothing_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), folders.Draft(tmp_path, "a") as path:
        (path / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_tag_is_replaced_at_once(tmp_path):
    save(tmp_path, "a", content="old")
    with (draft := folders.Draft(tmp_path, "a")) as path:
        (path / "checkpoint.json").write_text(MADE.to_json())
        (path / "file").write_text("new")
        assert (tmp_path / "a" / "file").read_text() == "old"
        draft.commit()
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} <= {"a", ".replaced"} and not list(tmp_path.glob(".replaced/*"))


@pytest.mark.parametrize("name", ["file", "folder", "other"])
def test_nothing_else_is_replaced(tmp_path, name):
    (tmp_path / "file").write_text("")
    for folder in ("folder", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "checkpoint.json").write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match=f"{name} is in the way: it would be replaced, but it is no checkpoint"):
        save(tmp_path, name)


def test_a_writer_that_died_while_it_replaced_a_tag(tmp_path):
    save(tmp_path, "a", content="old")
    (tmp_path / ".replaced").mkdir(exist_ok=True)
    (tmp_path / "a").rename(tmp_path / ".replaced" / "a")
    assert folders.find(tmp_path, "a") == tmp_path / ".replaced" / "a" and folders.tags(tmp_path) == ["a"]
    save(tmp_path, "b")
    assert (tmp_path / "a" / "file").read_text() == "old" and not list((tmp_path / ".replaced").iterdir())


def test_drafts_of_dead_writers_are_removed_and_no_others(tmp_path):
    host = folders._hidden(tmp_path).name.split(".", 4)[4]
    dead = [f".new.999999999.0.{host}", f".new.{os.getpid()}.0.{host}"]
    others = [".new.999999999.0.elsewhere", f".new.{os.getppid()}.0.{host}", f".new.999999999.1.{host}", ".new.txt"]
    for name in dead + others:
        (tmp_path / name / "x").mkdir(parents=True)
        if name != others[2]:  # touched just now: perhaps of a process of another container
            for path in (tmp_path / name / "x", tmp_path / name):
                os.utime(path, (1, 1))
    save(tmp_path, "a")
    assert {path.name for path in tmp_path.glob(".new*")} == set(others)


def test_pruning_keeps_the_newest_and_the_latest(tmp_path):
    for step, tag in enumerate("abcd"):
        save(tmp_path, tag, step)
    folders.point_latest(tmp_path, "a")
    folders.prune(tmp_path, 2)
    assert folders.tags(tmp_path) == ["a", "c", "d"]


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    folders.write_text(path, "one")
    with pytest.raises(ZeroDivisionError), folders.replacing(path) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
