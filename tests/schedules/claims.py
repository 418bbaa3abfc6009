"""What every built-in schedule of one stage per rank is held to: the claims of its docstring, checked on many sizes."""

import importlib
from fractions import Fraction

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import simulate

GRID = [(p, m) for p in (1, 2, 3, 4, 7) for m in (1, 2, 3, 4, 5, 8, 13)]  # m < p and p = 1 included
COSTS = {"forward": Fraction(7, 5), "backward_input": Fraction(11, 10), "backward_weight": Fraction(4, 5)}
BACKWARD = COSTS["backward_input"] + COSTS["backward_weight"]
on_many_sizes = pytest.mark.parametrize(("p", "m"), GRID)


def check_training_table(table, p, m, *, peak, ticks):
    """Bubble and makespan, which all of them share; memory and ticks, which differ; and that columns are ticks."""
    timeline = simulate(table, **COSTS)
    assert timeline.bubble == (p - 1) * (COSTS["forward"] + BACKWARD)
    assert timeline.makespan == timeline.bubble + m * (COSTS["forward"] + BACKWARD)
    assert timeline.peak_live == tuple(peak(rank) for rank in range(p))
    assert len(table.ticks[0]) == ticks
    assert table.ticks is not table.rows and table.ticks == table.rows, "built-in tables are tick-aligned as written"
    assert (table.num_ranks, table.num_stages, table.num_micro_batches, table.num_chunks) == (p, p, m, 1)
    assert not table.forward_only and not table.split_backward


def tick_of(table):
    return {op: tick for row in table.ticks for tick, op in enumerate(row) if op is not None}


def check_picture(module, *counts):
    """The picture in a docstring is what `str` prints."""
    loaded = importlib.import_module(f"jaxpipe.schedules.{module}")
    picture = [f"    {line}" for line in str(getattr(loaded, module)(*counts)).splitlines()]
    assert "\n".join(picture) in loaded.__doc__


def check_counts_are_checked(make):
    for counts, message in (((0, 4), "num_stages=0"), ((4, -1), "num_micro_batches=-1"), ((2, 2.0), r"batches=2\.0")):
        with pytest.raises(ScheduleError, match=f"{message}: it must be an integer of at least 1"):
            make(*counts)
    for bad in ("2", None, True, [2], 10**30):
        for counts in ((bad, 3), (3, bad)):
            with pytest.raises(ScheduleError, match=r"num_(stages|micro_batches)="):
                make(*counts)
