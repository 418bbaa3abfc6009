"""Which block of a program belongs to which part of a step."""

from jaxpipe.hardware.hlo import parse
from jaxpipe.hardware.structure import Op, blocks
from tests.hardware import texts


def test_blocks_of_a_step():
    found = [(b.computation.name, b.loop, b.branch, b.op, b.times, b.iterations) for b in blocks(parse(texts.TPU))]
    forward, backward = Op("F", 0), Op("B", 0)
    assert found == [
        ("main", -1, -1, None, 1, None),
        ("tick_body", 0, -1, None, 1, 5),
        ("forward", 0, 0, forward, 1, 5),
        ("layer", 0, 0, forward, 2, 5),
        ("backward", 0, 1, backward, 1, 5),
        ("usual", -1, -1, None, 1, None),  # and not the branch that is rarely taken
    ]


def test_parts():
    cycles = {}
    for block in blocks(parse(texts.TPU)):
        for instruction in block.computation:
            part = block.part(instruction)
            cycles[part] = cycles.get(part, 0) + instruction.cycles * block.times
    assert cycles == {"outside": 900, "loop": 67, "forward": 2030, "backward": 2050, "tail": 400}


def test_gpu():
    found = [(b.computation.name, b.loop, b.op, b.iterations) for b in blocks(parse(texts.GPU))]
    assert found == [("main", -1, None, None), ("body", 0, None, 7), ("branch", 0, Op("F", 1), 7)]


def test_rounds_of_ticks_are_one_loop():
    """An evaluation that pauses: a loop of rounds, with the loop over ticks inside."""
    text = (
        texts.TPU.replace("ENTRY %main (x:", "%round (x:").rstrip()
        + """

ENTRY %whole (z: f32[8,256]) -> f32[8,256] {
  %z = f32[8,256]{1,0} parameter(0)
  %while.9 = f32[8,256]{1,0} while(%z), condition=%tick_condition, body=%round
  ROOT %end = f32[8,256]{1,0} copy(%while.9)
}
"""
    )
    text = text.replace("%forward_condition, body=%tick_body", "%tick_condition, body=%tick_body")
    found = {b.computation.name: (b.loop, b.iterations) for b in blocks(parse(text))}
    assert found["whole"] == (-1, None) and found["round"] == (0, 5)
    assert found["tick_body"] == (0, None)  # what the program says
