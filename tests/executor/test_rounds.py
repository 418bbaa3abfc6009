"""Rounds of a generation: every stage of every group once in each period, tick after tick, no rank twice at once."""

import pytest

from jaxpipe.executor.rounds import Rounds
from tests.lowering.programs import loop_of, v_of


@pytest.mark.parametrize(
    ("placement", "period"),
    [
        ((0,), 1),
        ((0, 0, 0), 3),
        ((0, 1, 2, 3), 4),
        (loop_of(4, 3), 12),
        (v_of(3), 6),
        ((1, 0, 1, 1), None),
        ((1, 0, 0, 2, 1), None),
        ((2, 0, 1, 1, 0, 2, 0), None),
    ],
)
def test_every_stage_of_every_group(placement, period):
    made = Rounds.of(placement)
    ranks = 1 + max(placement)
    if period is not None:
        assert made.period == period, "no tick more than the rank with most stages needs"
    assert len(made.starts) == ranks and made.starts[0] == 0
    ran = {}
    for group, start in enumerate(made.starts):
        for stage, rank in enumerate(placement):
            tick = (start + stage) % made.period
            assert (tick, rank) not in ran, "a rank runs one thing at once"
            ran[tick, rank] = group
    table = {(t, r): g for t, row in enumerate(made.table) for r, g in enumerate(row) if g >= 0}
    assert table == ran
    assert made.period >= len(placement), "a token is back when its group begins again"
    for stage, edge in enumerate(zip(placement[:-1], placement[1:], strict=True), start=1):
        way = made.ways[made.way_to[stage]]
        assert edge in way.edges or (way.stays and edge[0] == edge[1])
    assert made.num_ticks(0) == 0 and made.num_ticks(3) == made.starts[-1] + 2 * made.period + len(placement)
    places = [(rank, made.place_on_rank(stage)) for stage, rank in enumerate(placement)]
    assert sorted(places) == [(rank, n) for rank in range(ranks) for n in range(placement.count(rank))]
