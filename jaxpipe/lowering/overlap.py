"""Which permutes may still be under way while the ops of the next tick run.

A message is permuted at the end of the tick that sends it, and is often not read by the first ops of the next tick. In
eager 1F1B a tick of forwards lies between a backward and the one that reads its gradient, and the other way round; in 1F1B
the next tick has forwards, which read outputs, before its backwards, which read gradients:

    eager 1F1B | F  permute y ......... B  permute dx ........ F  ...          y travels beside B, dx beside F
    1F1B       | F  B  permute y, dx | F  (dx arrives)  B  permute y, dx | ...

So an arrival has a place: in front of the first ops of the next tick that read such a value, or that send one, since what
is under way still lies where the next one will be put. If that is in front of all ops, nothing is gained.
"""

from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.period import Loop
from jaxpipe.lowering.program import IDLE, Program

# The kinds of op that read a value. They are also those that send one.
_TOUCH = {Y: ("F",), DX: ("B", "I")}


def phase_kinds(program: Program, loop: Loop, phase: int) -> tuple[str, ...]:
    """The kinds of op of a phase, in the order in which the loop has them.

    Forwards come first: they end early, and what they send can travel while other ranks still run backwards.
    """
    kinds = {cell.kind for _, cell in program.phase_cells(loop, phase)} - {IDLE}
    return tuple(sorted(kinds, key=lambda kind: (kind != "F", kind)))


def place_of_arrival(program: Program, loop: Loop, phase: int, channel: int) -> int | None:
    """Where what a phase sends over a channel arrives in the next phase: in front of the op of this number in `phase_kinds`
    (behind the last one: their number), or None: at the end of the phase that sends it.

    A program of several loops has none, because what one loop sends late the next one would have to receive. What stays on
    its rank is there at once.
    """
    if len(program.loops) > 1 or program.channels[channel].is_local or not program.phase_edges(loop, phase, channel):
        return None
    touch = _TOUCH[program.channels[channel].value]
    kinds = phase_kinds(program, loop, (phase + 1) % loop.period)
    return next((number for number, kind in enumerate(kinds) if kind in touch), len(kinds)) or None
