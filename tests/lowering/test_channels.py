"""Who sends what to whom."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from jaxpipe import schedules
from jaxpipe.lowering.channels import DX, Channel, Y, channels, clock, messages, paths
from jaxpipe.schedules import Op, Schedule
from tests.lowering.programs import in_random_order, loop_of, random_placements, random_schedules, v_of


def sent_in(schedule):
    return messages(schedule, clock(schedule))


@given(random_schedules())
def test_every_inner_boundary_is_crossed_once_each_way(schedule):
    """Counted from outside: an output and a gradient per micro-batch and inner boundary, sent before it is read."""
    ticks = clock(schedule)
    routed = messages(schedule, ticks)
    stages, micro_batches = schedule.num_stages, schedule.num_micro_batches
    wanted = {(Y, s, m, (s - 1, s)) for s in range(1, stages) for m in range(micro_batches)}
    wanted |= {(DX, s, m, (s + 1, s)) for s in range(stages - 1) for m in range(micro_batches)}
    assert sorted((each.value, each.stage, each.micro_batch, each.edge) for each in routed) == sorted(wanted)
    for each in routed:
        kinds = "F" if each.value == Y else "BI"  # a table has B or I

        def tick(stage, m=each.micro_batch, kinds=kinds):
            return next(ticks[kind, stage, m] for kind in kinds if (kind, stage, m) in ticks)

        assert each.read == tick(each.stage)
        assert each.sent == tick(each.stage + (-1 if each.value == Y else 1))
        assert each.sent < each.read


def test_the_clock_has_every_op_once():
    assert clock(schedules.one_f_one_b(2, 2)) == {
        ("F", 0, 0): 0,
        ("F", 1, 0): 1,
        ("B", 1, 0): 2,
        ("F", 0, 1): 2,
        ("B", 0, 0): 3,
        ("F", 1, 1): 3,
        ("B", 1, 1): 4,
        ("B", 0, 1): 5,
    }


def test_channels_have_all_edges_of_a_value_and_no_cycle():
    forward, backward = channels(sent_in(schedules.gpipe(3, 2)))
    assert forward == Channel(Y, frozenset({(0, 1), (1, 2)})) and forward.name == "forward"
    assert backward == Channel(DX, frozenset({(1, 0), (2, 1)})) and backward.name == "backward"
    assert channels(sent_in(schedules.gpipe(1, 4))) == ()
    assert channels(sent_in(schedules.forward_only(2, 4))) == (Channel(Y, frozenset({(0, 1)})),)


def test_a_split_backward_sends_the_gradient_of_the_input():
    rows = tuple(tuple(Op(kind, s, 0) for kind in "FIW") for s in range(2))
    schedule = Schedule(rows=rows, placement=(0, 1))
    ticks = clock(schedule)
    (message,) = [each for each in messages(schedule, ticks) if each.value == DX]
    assert (message.sent, message.read) == (ticks["I", 1, 0], ticks["I", 0, 0])


@given(random_placements())
def test_each_permute_is_a_set_of_paths(placement):
    """No source and no target twice, nothing goes round, each edge is in one channel, and what stays has one of its own."""
    routed = sent_in(in_random_order(placement, 2, 0))
    found = channels(routed)
    carried = [(channel.value, edge) for channel in found for edge in channel.edges]
    assert sorted(carried) == sorted({(each.value, each.edge) for each in routed}), "once each"
    for value in (Y, DX):
        assert sum(channel.is_local for channel in found if channel.value == value) <= 1
    for channel in found:
        if channel.is_local:
            assert all(source == target for source, target in channel.edges)
        else:
            _check_paths(channel.edges)


def _check_paths(edges):
    sources, targets = [a for a, _ in edges], [b for _, b in edges]
    assert len(set(sources)) == len(sources) and len(set(targets)) == len(targets)
    left = dict(edges)
    while left:  # taken off from the ends: of a cycle nothing could be
        ends = [source for source, target in left.items() if target not in left]
        assert ends, f"{sorted(edges)} goes round"
        for source in ends:
            del left[source]


def test_a_loop_needs_one_channel_more_and_a_v_one_for_each_way():
    """For each value: (0, 1), (1, 2) and (2, 0); down, up, and the stage beside the other one."""

    def edges_of(placement):
        found = channels(sent_in(in_random_order(placement, 2, 0)))
        return [sorted(channel.edges) for channel in found if channel.value == Y]

    assert edges_of(loop_of(3, 2)) == [[(0, 1), (1, 2)], [(2, 0)]]
    assert edges_of(loop_of(2, 3)) == [[(0, 1)], [(1, 0)]]
    assert edges_of(v_of(3)) == [[(2, 2)], [(0, 1), (1, 2)], [(1, 0), (2, 1)]]
    assert edges_of(loop_of(1, 3)) == [[(0, 0)]]


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda e: e[0] != e[1]), max_size=7))
def test_there_are_as_few_sets_as_possible(edges):
    """Compared with all ways to deal out few edges, one set after the other."""
    found = paths(edges)
    assert sorted(edge for group in found for edge in group) == sorted(edges)
    for group in found:
        _check_paths(group)
    assert len(found) == _fewest(tuple(sorted(edges)))


def _fewest(edges):
    for count in range(len(edges) + 1):
        for dealt in itertools.product(range(count), repeat=max(0, len(edges) - 1)):
            if edges and not count:
                break
            groups = [{edge for edge, own in zip(edges, (0, *dealt), strict=True) if own == n} for n in range(count)]
            if all(_are_paths(group) for group in groups):
                return count
    raise AssertionError(edges)


def _are_paths(edges):
    try:
        _check_paths(edges)
    except AssertionError:
        return False
    return True
