"""Where late messages arrive. That nothing is read too early or overwritten, every lowered program checks by a replay."""

from jaxpipe import schedules
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.overlap import phase_kinds, place_of_arrival


def places(program):
    """Per (phase, kind of value): the kinds of op of the next phase, and the place."""
    (loop,) = program.loops
    found = {}
    for phase in range(loop.period):
        for number, channel in enumerate(program.channels):
            if program.phase_edges(loop, phase, number):
                kinds = phase_kinds(program, loop, (phase + 1) % loop.period)
                found[phase, channel.value] = kinds, place_of_arrival(program, loop, phase, number)
    return found


def test_where_messages_arrive():
    assert places(lower(schedules.eager_one_f_one_b(4, 8))) == {(0, Y): (("B",), 1), (1, DX): (("F",), 1)}
    both = ("F", "B")
    wanted = {(0, Y): (both, None), (0, DX): (both, 1), (1, Y): (both, None), (1, DX): (both, 1)}
    assert places(lower(schedules.one_f_one_b(4, 8))) == wanted
    assert places(lower(schedules.forward_only(4, 8))) == {(0, Y): (("F",), None)}
    gpipe = lower(schedules.gpipe(4, 8))
    late = {place_of_arrival(gpipe, loop, 0, number) for loop in gpipe.loops for number in range(2)}
    assert late == {None}, "each op reads what the tick before it has sent"
