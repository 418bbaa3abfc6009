"""What the docstrings of the built-in schedules promise: pictures, formulas, tick counts, alignment."""

import importlib
from fractions import Fraction

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, Schedule, eager_one_f_one_b, forward_only, gpipe, one_f_one_b, simulate

TRAINING = {"gpipe": gpipe, "one_f_one_b": one_f_one_b, "eager_one_f_one_b": eager_one_f_one_b}
GRID = [(p, m) for p in (1, 2, 3, 4, 7) for m in (1, 2, 3, 4, 5, 8, 13)]  # m < p and p = 1 included
COSTS = {"forward": Fraction(7, 5), "backward_input": Fraction(11, 10), "backward_weight": Fraction(4, 5)}
BACKWARD = COSTS["backward_input"] + COSTS["backward_weight"]


@pytest.mark.parametrize(("name", "make"), TRAINING.items())
@pytest.mark.parametrize(("p", "m"), GRID)
def test_bubble_peak_and_ticks(name, make, p, m):
    table = make(p, m)
    timeline = simulate(table, **COSTS)
    assert timeline.bubble == (p - 1) * (COSTS["forward"] + BACKWARD)
    assert timeline.makespan == timeline.bubble + m * (COSTS["forward"] + BACKWARD)
    peak = {
        "gpipe": lambda r: m,
        "one_f_one_b": lambda r: min(m, p - r),
        "eager_one_f_one_b": lambda r: min(m, 2 * (p - 1 - r) + 1),
    }[name]
    assert timeline.peak_live == tuple(peak(rank) for rank in range(p))
    assert len(table.ticks[0]) == (2 * (m + 2 * (p - 1)) if name == "eager_one_f_one_b" else 2 * (m + p - 1))
    assert table.ticks is not table.rows and table.ticks == table.rows, "built-in tables are tick-aligned as written"
    assert (table.num_ranks, table.num_stages, table.num_micro_batches, table.num_chunks) == (p, p, m, 1)
    assert not table.forward_only and not table.split_backward


@pytest.mark.parametrize(("p", "m"), GRID)
def test_tick_formulas(p, m):
    def at(table):
        return {op: tick for row in table.ticks for tick, op in enumerate(row) if op is not None}

    one, pipe, eager = at(one_f_one_b(p, m)), at(gpipe(p, m)), at(eager_one_f_one_b(p, m))
    for s in range(p):
        for i in range(m):
            forward, backward = Op("F", s, i), Op("B", s, i)
            assert (one[forward], one[backward]) == (2 * i + s, 2 * i + 2 * p - 1 - s)
            assert (pipe[forward], pipe[backward]) == (i + s, m + p - 1 + i + p - 1 - s)
            k, odd = divmod(eager[forward], 2)
            assert (i, odd) == (k - s, 0)
            k, odd = divmod(eager[backward], 2)
            assert (i, odd) == (k - 2 * (p - 1) + s, 1)


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize(("p", "m"), GRID)
def test_forward_only(p, m, v):
    table = forward_only(p * v, m, num_chunks=v)
    assert table.forward_only
    assert table.placement == tuple(stage % p for stage in range(p * v))
    assert table.ticks == table.rows
    num_ticks = m * v + p - 1 if m >= p else p * v + m - 1
    assert len(table.ticks[0]) == num_ticks
    for sync in ("none", "neighbour", "global"):
        timeline = simulate(table, forward=3, sync=sync)
        assert timeline.makespan == Fraction(3 * num_ticks, v)
        assert m < p or timeline.bubble == Fraction((p - 1) * 3, v)
    assert timeline.peak_live == (Fraction(1, v),) * p
    if v == 1:
        assert all(op == Op("F", r, t - r) for r, row in enumerate(table.ticks) for t, op in enumerate(row) if op)


def test_forward_only_buffers_do_not_grow_with_micro_batches():
    """What waits on rank 0 between two chunks is bounded by the ranks: the claim for groups over breadth-first."""
    for p, m in ((4, 7), (4, 9), (4, 64), (3, 100)):
        ticks = forward_only(2 * p, m, num_chunks=2).ticks
        arrives = {op.micro_batch: t + 1 for t, op in enumerate(ticks[p - 1]) if op and op.stage == p - 1}
        leaves = {op.micro_batch: t for t, op in enumerate(ticks[0]) if op and op.stage == p}
        waiting = max(sum(arrives[i] <= t <= leaves[i] for i in range(m)) for t in range(len(ticks[0])))
        assert waiting <= p


@pytest.mark.parametrize(
    ("module", "counts"),
    [("gpipe", (4, 6)), ("one_f_one_b", (4, 6)), ("eager_one_f_one_b", (4, 4)), ("forward_only", (4, 6))]
    + [("forward_only", (4, 4, 2))],
)
def test_docstring_picture_is_what_str_prints(module, counts):
    loaded = importlib.import_module(f"jaxpipe.schedules.{module}")
    picture = [f"    {line}" for line in str(getattr(loaded, module)(*counts)).splitlines()]
    assert "\n".join(picture) in loaded.__doc__


@pytest.mark.parametrize("make", [*TRAINING.values(), forward_only])
@pytest.mark.parametrize(("counts", "message"), [((0, 4), "num_stages=0"), ((4, -1), "num_micro_batches=-1")])
def test_counts_are_checked(make, counts, message):
    with pytest.raises(ScheduleError, match=f"{message}: it must be an integer of at least 1"):
        make(*counts)
    with pytest.raises(ScheduleError, match=r"num_micro_batches=2\.0"):
        make(2, 2.0)


def test_forward_only_refuses_stages_that_do_not_divide():
    with pytest.raises(ScheduleError, match="num_stages=5 cannot be dealt out as num_chunks=2.* Use num_stages=6"):
        forward_only(5, 4, num_chunks=2)


def test_from_ticks_refuses_two_ops_in_one_cell():
    with pytest.raises(ScheduleError, match="0F1 and 0F0 are both at tick 0 of rank 0"):
        Schedule.from_ticks({Op("F", 0, 0): 0, Op("F", 0, 1): 0}, placement=(0,))
