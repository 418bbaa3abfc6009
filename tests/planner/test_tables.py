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
def test_what_is_kept_of_long_tables_is_known_from_short_ones(name, chunks):
    live, pending = tables.kept(name, 3, chunks, 18)
    whole = tables.as_table(tables.make(name, 3, chunks, 18))
    assert live.tolist() == whole.live.tolist() and pending.tolist() == whole.pending.tolist()
    if name in tables.HOLDS:
        assert live.tolist() == np.minimum(tables.HOLDS[name](3), 18).tolist()


def test_only_schedules_that_a_step_can_run_are_tried():
    found = tables.schedules()
    assert found["1f1b"] == (1,) and set(found) <= set(TRAINING)
    assert list(found) == [name for name in TRAINING if name in found]
