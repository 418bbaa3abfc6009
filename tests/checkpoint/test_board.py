"""Notices are files of one size, which are written in place; waiting ends when nothing new comes."""

import itertools

import pytest

from jaxpipe.checkpoint import board
from jaxpipe.checkpoint.board import DONE, FAILED, LEFT, SAVED, SIZE, WRITING, Board, Notice
from jaxpipe.errors import CheckpointError


@pytest.fixture
def boards(tmp_path):
    made = [Board(tmp_path, me) for me in range(2)]
    for each in made:
        each.join()
    return made


def test_what_one_posts_the_other_reads(boards):
    one, other = boards
    assert other.read(0) == Notice(WRITING)
    for notice in (Notice(WRITING, 12), Notice(FAILED, text="no “room” left\n" * 5), Notice(SAVED)):
        one.post(notice)
        assert other.read(0) == notice
    assert [Notice(state).last for state in (WRITING, DONE, FAILED, SAVED, LEFT)] == [False, False, True, True, True]


def test_nothing_needs_more_room_than_in_the_beginning(boards, tmp_path):
    path = tmp_path / "process_0"
    before = path.stat()
    boards[0].post(Notice(FAILED, text="é" * 10_000))
    assert (path.stat().st_size, path.stat().st_ino) == (SIZE, before.st_ino)
    assert boards[1].read(0).text.startswith("ééé")


def test_a_notice_that_is_half_written_is_not_looked_at(boards, tmp_path):
    boards[0].post(Notice(WRITING, 3))
    assert boards[1].read(0).items == 3
    (tmp_path / "process_0").write_bytes(b'["failed", 3, "no roo')
    assert boards[1].read(0) == Notice(WRITING, 3)


def test_one_that_cannot_say_anything_has_no_notice(boards, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(board, "_as_bytes", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    boards[0].post(Notice(DONE))
    assert boards[1].read(0) is None and "No space left" in caplog.text
    boards[0].post(Notice(DONE))  # again: nothing happens


def test_waiting_for_all(boards):
    one, other = boards
    seen = []

    def changed(notices):
        seen.append(notices[1])
        other.post(Notice(WRITING, 1) if len(seen) == 1 else Notice(DONE, 2))

    found = one.wait([1], lambda notices: notices[1].state == DONE, changed=changed)
    assert found == {1: Notice(DONE, 2)} and seen == [Notice(WRITING), Notice(WRITING, 1)]


def test_waiting_in_vain(boards, tmp_path, caplog, monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(board.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(board.time, "sleep", lambda _: None)
    boards[1].post(Notice(WRITING, 4))
    with pytest.raises(CheckpointError, match=r"hear of process 1 \(writing, 4 items written\), .* for 100 seconds"):
        boards[0].wait([1], lambda _: False, patience=100)
    assert caplog.text.count("waiting for process 1 (writing, 4 items written), since 70 seconds") == 1
    many = board._listed({process: Notice(WRITING) for process in range(20)} | {20: Notice(LEFT), 21: None})
    assert many.count("process") == 8 and many.endswith("and 12 more")
