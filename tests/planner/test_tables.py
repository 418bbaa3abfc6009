"""Tables as arrays, against the schedules that they are made of."""

import numpy as np
import pytest

from jaxpipe.planner import tables
from jaxpipe.schedules.registry import TRAINING

ALL = [(name, 2 if name in ("zbv", *tables.CHUNKED) else 1) for name in TRAINING]


@pytest.mark.parametrize(("name", "chunks"), ALL)
def test_every_op_is_there_and_the_placement_is_the_schedules(name, chunks):
    schedule, table = tables.make(name, 4, chunks, 8), tables.table(name, 4, chunks, 8)
    assert table.placement == schedule.placement == tables.placement(name, 4, chunks)
    assert len(table.ticks) == len(schedule.ticks[0])
    assert table.split == schedule.split_backward == tables.is_split(name)
    assert sum(np.count_nonzero(tick.kinds) for tick in table.ticks) == sum(
        op is not None for row in schedule.rows for op in row
    )


@pytest.mark.parametrize(("name", "chunks"), ALL)
def test_what_is_kept_of_long_tables_is_known_from_short_ones(name, chunks, monkeypatch):
    for ranks in (3, 5):
        for rounds in (2, 3):
            monkeypatch.setattr(tables, "_ROUNDS", rounds)
            live, pending = tables.kept(name, ranks, chunks, 6 * ranks)
            whole = tables.as_table(tables.make(name, ranks, chunks, 6 * ranks))
            assert live.tolist() == whole.live.tolist() and pending.tolist() == whole.pending.tolist()
            if name in tables.HOLDS:
                assert live.tolist() == tables.HOLDS[name](ranks).tolist()


@pytest.mark.parametrize(("name", "chunks"), [*ALL, ("interleaved", 4), ("interleaved_zero_bubble", 3)])
def test_what_is_kept_at_least(name, chunks):
    """Never more than what is kept, and as much where there are two rounds, but for the middle of many chunks."""
    for ranks in (2, 3, 5):
        for rounds in (1, 2, 4):
            found, kept = (
                np.array(one(name, ranks, chunks, ranks * rounds)) for one in (tables.kept_at_least, tables.kept)
            )
            assert np.all(found <= kept), (ranks, rounds, found.tolist(), kept.tolist())
            assert rounds < 2 or chunks > 2 or np.array_equal(found, kept), (
                ranks,
                rounds,
                found.tolist(),
                kept.tolist(),
            )


def test_only_schedules_that_a_step_can_run_are_tried():
    found = tables.schedules()
    assert found["1f1b"] == (1,) and set(found) <= set(TRAINING)
    assert list(found) == [name for name in TRAINING if name in found]


@pytest.mark.parametrize("name", ["1f1b", "eager_1f1b", "gpipe", "zero_bubble", "zbv"])
def test_what_is_kept_at_least_of_any_number_of_micro_batches(name):
    chunks = 2 if name == "zbv" else 1
    for count in range(1, 12):
        found, kept = (np.array(one(name, 4, chunks, count)) for one in (tables.kept_at_least, tables.kept))
        assert np.all(found <= kept), (count, found.tolist(), kept.tolist())
