"""Figures show every op, and below it what its rank keeps."""

import re

import pytest

from jaxpipe.schedules import draw, forward_only, one_f_one_b, simulate, zbv, zero_bubble

pytest.importorskip("matplotlib")


def texts(path):
    return re.findall(r">([^<>]+)</text>", path.read_text())


def test_ops_title_and_legend(tmp_path):
    path = tmp_path / "picture.svg"
    draw(simulate(one_f_one_b(4, 8)), path, name="1f1b")
    shown = texts(path)
    assert [shown.count(str(number)) >= 8 for number in range(8)] == [True] * 8, "F and B of each on four ranks"
    assert "1f1b: 4 ranks, 8 micro-batches: makespan 33, bubble 9 = 27.3%" in shown
    assert {"forward", "backward", "idle", "time", "rank 0", "rank 3"} <= set(shown)
    assert not {"weight gradient", "chunk 0"} & set(shown)
    draw(simulate(one_f_one_b(4, 8)), tmp_path / "again.svg", name="1f1b")
    assert (tmp_path / "again.svg").read_bytes() == path.read_bytes(), "no date, no random ids"


def test_halves_chunks_and_bytes(tmp_path):
    path = tmp_path / "split.svg"
    timeline = simulate(zbv(4, 4), memory=[2e9, 1e9, 1e9, 1e9], pending=[3e8] * 4)
    draw(timeline, path)
    shown = texts(path)
    assert {"input gradient", "weight gradient", "chunk 0", "chunk 1"} <= set(shown) and "backward" not in shown
    assert "memory kept by micro-batches (right: the most)" in shown
    assert timeline.peak_bytes == (8.3e9, 4.3e9) and [shown.count(text) for text in ("8.3 GB", "4.3 GB")] == [1, 1]
    fills = set(re.findall(r"fill: (#[0-9a-f]{6})", path.read_text()))
    assert {"#6cb6e0", "#ea6f53", "#fbd95f", "#c4e2f3"} <= fills, "three kinds, and a paler second chunk"
    draw(zero_bubble(2, 3), path)
    assert "micro-batches kept (right: the most)" in texts(path)
    draw(forward_only(4, 2, num_chunks=2), path)
    assert not [text for text in texts(path) if "kept" in text], "an evaluation keeps nothing"


def test_a_stage_that_takes_no_time_gets_no_label_and_the_others_do(tmp_path):
    draw(simulate(one_f_one_b(2, 3), [0.01, 1], [0.01, 1], [0, 1]), tmp_path / "odd.svg")
    shown = texts(tmp_path / "odd.svg")
    assert all(2 <= shown.count(str(number)) <= 4 for number in range(3))
    draw(simulate(one_f_one_b(2, 2), 0, 0, 0), tmp_path / "none.svg")


def test_png(tmp_path):
    path = tmp_path / "picture.png"
    draw(one_f_one_b(3, 4), str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
