"""Forwards on any placement: nobody idles who could work, and known placements take as long as their formulas say."""

from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.schedules import Op, forward_only
from jaxpipe.schedules import placed_forward_only as module
from jaxpipe.schedules.placed_forward_only import placed_forward_only

placements = st.lists(st.integers(1, 3), min_size=1, max_size=5).flatmap(
    lambda counts: st.permutations([rank for rank, count in enumerate(counts) for _ in range(count)])
)


@given(placements, st.integers(1, 9))
def test_no_rank_idles_while_it_could_run_something(placement, micro_batches):
    table = placed_forward_only(placement, micro_batches)  # checked when it is made
    assert table.placement == tuple(placement) and table.forward_only
    if placement == [stage % table.num_ranks for stage in range(len(placement))]:
        return  # groups of micro-batches, which may wait where ranks do not divide them
    ticks = {op: tick for row in table.ticks for tick, op in enumerate(row) if op is not None}
    for rank, row in enumerate(table.ticks):
        for tick, op in enumerate(row):
            mine = [other for other in ticks if placement[other.stage] == rank and ticks[other] > tick]
            could = [o for o in mine if o.stage == 0 or ticks[Op("F", o.stage - 1, o.micro_batch)] < tick]
            assert op is not None or not could, f"rank {rank} idles at tick {tick} and could run {could}"


def test_one_stage_per_rank_and_loops_are_the_known_tables():
    assert placed_forward_only(range(4), 6) == forward_only(4, 6)
    assert placed_forward_only((0, 1, 2, 0, 1, 2), 7) == forward_only(6, 7, num_chunks=2)
    assert placed_forward_only((0, 0, 0), 2) == forward_only(3, 2, num_chunks=3)
    swapped = placed_forward_only((1, 0), 3)
    assert len(swapped.ticks[0]) == 3 + 1 and swapped.rows[1][0] == Op("F", 0, 0)


def test_picture():
    rows = [line.strip() for line in module.__doc__.splitlines() if "|" in line]
    assert rows == [line.rstrip() for line in str(placed_forward_only((0, 1, 1, 0), 3)).splitlines()]
