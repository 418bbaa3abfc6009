"""Folding the table into loops."""

from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.lowering.period import Loop, fold

F, B, NONE = frozenset("F"), frozenset("B"), frozenset()
UP, DOWN = (0, (0, 1)), (1, (1, 0))
tables = st.lists(
    st.tuples(st.frozensets(st.sampled_from("FB")), st.frozensets(st.sampled_from([UP, DOWN, (0, (1, 2))]))),
    min_size=1,
    max_size=14,
)


@given(tables)
def test_every_tick_is_in_one_phase_of_one_loop(table):
    kinds, edges = zip(*table, strict=True)
    loops = fold(kinds, edges)
    ticks = [t for loop in loops for phase in range(loop.period) for t in loop.phase_ticks(phase)]
    assert sorted(ticks) == list(range(len(table)))
    assert [loop.start for loop in loops] == [0, *(loop.stop for loop in loops[:-1])]
    for loop in loops:
        assert all(len(loop.phase_ticks(phase)) <= loop.num_iterations for phase in range(loop.period))
        assert len(loop.phase_ticks(0)) == loop.num_iterations


def test_a_cut_where_no_kind_of_op_goes_on():
    silent = [NONE] * 6
    assert fold([F, F, F, B, B, B], silent) == (Loop(0, 3, 1), Loop(3, 6, 1))
    assert fold([F, F, NONE, B, B, F], silent) == (Loop(0, 6, 1),)
    assert fold([F, F, F | B, B, B, B], silent) == (Loop(0, 6, 1),), "both at once in one tick"
    assert [(loop.start, loop.stop) for loop in fold([NONE, F, NONE, B], silent[:4])] == [(0, 3), (3, 4)]


def test_more_ticks_in_the_body_where_that_saves_more():
    """A tick of F, one of W, a tick of I, one of W, each edge in a tick of its own: four ticks, where there are enough."""
    row = [(F | B, frozenset({UP})), (frozenset("W"), NONE), (F | B, frozenset({DOWN})), (frozenset("W"), NONE)]
    assert fold(*zip(*(row * 4), strict=True)) == (Loop(0, 16, 4),)
    assert fold(*zip(*(row * 3), strict=True)) == (Loop(0, 12, 2),), (
        "each body is compiled: it has to be run four times"
    )


def test_two_ticks_in_the_body_only_where_that_saves_permutes():
    both = F | B
    up, down = frozenset({UP}), frozenset({DOWN})
    assert fold([both] * 5, [up, down, up, down, up]) == (Loop(0, 5, 2),)
    assert fold([both] * 5, [up | down] * 5) == (Loop(0, 5, 1),), "equal: half the code"
    assert fold([F] * 5, [up, NONE, up, NONE, up]) == (Loop(0, 5, 1),), "one kind of op: half the code"
    assert Loop(0, 5, 2).num_iterations == 3 and list(Loop(0, 5, 2).phase_ticks(1)) == [1, 3]
