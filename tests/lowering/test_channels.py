"""Who sends what to whom."""

from hypothesis import given

from jaxpipe import schedules
from jaxpipe.lowering.channels import DX, Channel, Y, channels, clock, messages
from jaxpipe.schedules import Op, Schedule
from tests.lowering.programs import random_schedules


@given(random_schedules())
def test_every_inner_boundary_is_crossed_once_each_way(schedule):
    """Counted from outside: an output and a gradient per micro-batch and inner boundary, sent before it is read."""
    routed = messages(schedule)
    stages, micro_batches = schedule.num_stages, schedule.num_micro_batches
    wanted = {(Y, s, m, (s - 1, s)) for s in range(1, stages) for m in range(micro_batches)}
    wanted |= {(DX, s, m, (s + 1, s)) for s in range(stages - 1) for m in range(micro_batches)}
    assert sorted((each.value, each.stage, each.micro_batch, each.edge) for each in routed) == sorted(wanted)
    ticks = clock(schedule)
    for each in routed:
        kind = "F" if each.value == Y else "B"
        assert each.read == ticks[kind, each.stage, each.micro_batch]
        assert each.sent == ticks[kind, each.stage + (-1 if each.value == Y else 1), each.micro_batch]
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
    forward, backward = channels(messages(schedules.gpipe(3, 2)))
    assert forward == Channel(Y, frozenset({(0, 1), (1, 2)})) and forward.name == "forward"
    assert backward == Channel(DX, frozenset({(1, 0), (2, 1)})) and backward.name == "backward"
    assert channels(messages(schedules.gpipe(1, 4))) == ()
    assert channels(messages(schedules.forward_only(2, 4))) == (Channel(Y, frozenset({(0, 1)})),)


def test_a_split_backward_sends_the_gradient_of_the_input():
    rows = tuple(tuple(Op(kind, s, 0) for kind in "FIW") for s in range(2))
    schedule = Schedule(rows=rows, placement=(0, 1))
    (message,) = [each for each in messages(schedule) if each.value == DX]
    ticks = clock(schedule)
    assert (message.sent, message.read) == (ticks["I", 1, 0], ticks["I", 0, 0])
