"""`schedule=`: names, tables and files; and the promise that this package is plain Python."""

import ast
import sys
from pathlib import Path

import pytest

import jaxpipe.schedules
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import (
    Schedule,
    eager_one_f_one_b,
    forward_only,
    get,
    gpipe,
    interleaved,
    interleaved_zero_bubble,
    looped_bfs,
    one_f_one_b,
    registry,
    zbv,
    zero_bubble,
)

FOLDER = Path(jaxpipe.schedules.__file__).parent


@pytest.mark.parametrize(
    ("name", "make", "chunks"),
    [
        ("1f1b", one_f_one_b, 1),
        ("eager_1f1b", eager_one_f_one_b, 1),
        ("gpipe", gpipe, 1),
        ("zero_bubble", zero_bubble, 1),
        ("zbv", zbv, 2),
        ("interleaved", interleaved, 3),
        ("looped_bfs", looped_bfs, 3),
        ("interleaved_zero_bubble", interleaved_zero_bubble, 3),
    ],
)
def test_names_tables_and_files(name, make, chunks, tmp_path):
    counts, given = (3 * chunks, 5), ((chunks,) if name in registry.CHUNKED else ())
    expected = make(*counts, *given)
    path = tmp_path / "table.csv"
    path.write_text(expected.to_csv())
    for schedule in (name, expected, path, str(path)):
        assert get(schedule, *counts, num_chunks=chunks) == expected
        assert registry.chunks_of(schedule, chunks) == chunks == expected.num_chunks
    if name not in registry.CHUNKED:
        assert get(name, *counts) == expected and registry.chunks_of(name) == chunks
    assert get(path, *counts) == expected and registry.chunks_of(path) == chunks
    assert set(registry.TRAINING) | {"forward_only"} == set(registry.ALL)


def test_one_chunk_is_what_is_meant_if_nothing_is_said():
    assert get("interleaved", 4, 3) == interleaved(4, 3, num_chunks=1)
    assert registry.chunks_of("interleaved") == 1
    assert registry.find("forward_only", 4, 3, 2) == forward_only(4, 3, num_chunks=2)


@pytest.mark.parametrize(
    ("schedule", "chunks", "message"),
    [
        (
            "1f1b",
            2,
            "num_chunks=2 with '1f1b', which has 1 stage per rank. Leave .* 'interleaved', 'looped_bfs', 'interl",
        ),
        ("zbv", 3, "num_chunks=3 with 'zbv', which has 2 stages per rank"),
        (gpipe(4, 6), 2, "num_chunks=2 with <Schedule 4 ranks x 6 micro-batches.*, which has 1 stage per rank"),
        ("interleaved", 3, "num_stages=4 cannot be dealt out as num_chunks=3 per rank"),
        ("interleaved", 0, "num_chunks=0: it must be an integer of at least 1"),
        ("interleaver", 2, "Did you mean 'interleaved'"),
    ],
)
def test_chunks_that_do_not_fit(schedule, chunks, message):
    with pytest.raises(ScheduleError, match=message):
        get(schedule, 4, 6, chunks)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("1F1B", r"'1F1B' is not a schedule. Did you mean '1f1b'\? Use one of '1f1b', 'eager_1f1b', 'gpipe', 'interl"),
        ("gpip", r"Did you mean 'gpipe'\?"),
        ("dataflow", "'dataflow' is not a schedule. Use one of '1f1b'"),
        (gpipe(4, 6), "is a table of 4 stages and 6 micro-batches, but 3 stages and 5 micro-batches are asked for"),
        (forward_only(3, 5), "has no backward ops, so it cannot train"),
        (None, "schedule=None must be a name .*, a Schedule, or a path"),
        ("nowhere/table.csv", "cannot read the schedule file 'nowhere/table.csv'"),
    ],
)
def test_messages(schedule, message):
    with pytest.raises(ScheduleError, match=message):
        get(schedule, 3, 5)


def test_a_file_with_other_counts_is_named(tmp_path):
    path = tmp_path / "six.csv"
    path.write_text(one_f_one_b(2, 6).to_csv())
    with pytest.raises(ScheduleError, match=r"six\.csv' is a table of 2 stages and 6 micro-batches"):
        get(path, 2, 5)


def test_chunks_count_as_stages():
    table = Schedule.from_csv("0F0,,2F0,,,2B0,,0B0\n,1F0,,3F0,3B0,,1B0,\n")
    assert get(table, 4, 1) is table


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_no_import_beyond_the_standard_library(path):
    """Not jax, not numpy: a schedule is integers. The one exception is matplotlib, inside the functions that draw."""
    allowed = {"jaxpipe.errors", "jaxpipe.checks", "jaxpipe.columns", "jaxpipe.schedules"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            lazy = path.name == "figure.py" and node.col_offset > 0 and name.split(".")[0] == "matplotlib"
            inside = any(name == top or name.startswith(top + ".") for top in allowed)
            assert inside or lazy or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"
