"""From cycles and bytes to seconds: what a step takes at the published clock, and where the slowest rank spends it.

It is an estimate. The cycles are those of the TPU compiler, which counts an instruction as if it were alone. A transfer
that has work beside it is taken to be hidden. One that has none takes its bytes over the published speed of a link, or of
two, for collectives that go round in both directions. Waiting follows the ticks of the program (`steptime`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxpipe.hardware.chips import Chip
from jaxpipe.hardware.collectives import Collective
from jaxpipe.hardware.steptime import ticks
from jaxpipe.hardware.structure import BACKWARD, FORWARD, LOOP, TAIL, Op
from jaxpipe.lowering.program import Cell, Program


@dataclass(frozen=True)
class Costs:
    """Cycles.

    Attributes:
      ops: of one run of each op, its tail included.
      tails: of the tail in it.
      tick: between the branches, per tick.
      shared_tail: of a step, in a tail that all ranks share.
      outside: of a step, before and after the ticks.
      collectives: of a step.
      inside: those of one run of each op, which are among them.
    """

    ops: Mapping[Op, float]
    tails: Mapping[Op, float]
    tick: float
    shared_tail: float
    outside: float
    collectives: Sequence[Collective]
    inside: Mapping[Op, Sequence[Collective]] = field(default_factory=dict)


def estimate(program: Program, op_of: Callable[[Cell], Op], costs: Costs, chip: Chip) -> dict[str, float]:
    """Seconds of a step on the rank that works longest, by what it does; "waiting" fills up to the end of the step.

    Returns:
      "forward", "backward", "tail", "loop", "transfers" (those that nothing is done beside), "optimizer" (all work before
      and after the ticks) and "waiting"; they add up to the step.
    """
    assert chip.clock is not None
    in_ticks = sum(_seconds(one, chip) for one in costs.collectives if one.part == LOOP)
    around = sum(_seconds(one, chip) for one in costs.collectives if one.part == "outside")
    permute = in_ticks / program.num_ticks
    talks = {op: sum(_seconds(one, chip) for one in costs.inside.get(op, ())) for op in costs.ops}
    works = {op: cycles / chip.clock for op, cycles in costs.ops.items()}
    walked = ticks(program, op_of, {op: works[op] + talks[op] for op in works}, costs.tick / chip.clock, permute)
    slowest = max(range(program.num_ranks), key=lambda rank: walked.busy[rank])
    found = {FORWARD: 0.0, BACKWARD: 0.0, TAIL: 0.0, LOOP: 0.0, "transfers": 0.0}
    for row in program.cells:
        cell = row[slowest]
        if cell.stage >= 0:
            op, tail = op_of(cell), costs.tails[op_of(cell)] / chip.clock
            found[FORWARD if op.kind == "F" else BACKWARD] += works[op] - tail
            found[TAIL] += tail
            found["transfers"] += talks[op]
    found[LOOP] = costs.tick / chip.clock * program.num_ticks
    found["transfers"] += in_ticks
    waiting = max(walked.total - sum(found.values()), 0.0)
    found[TAIL] += costs.shared_tail / chip.clock
    found["transfers"] += around
    return found | {"optimizer": costs.outside / chip.clock, "waiting": waiting}


def _seconds(one: Collective, chip: Chip) -> float:
    """The time of all collectives of one sort that nothing is done beside."""
    if one.asynchronous:
        return 0.0
    if one.kind == "collective-permute":
        return one.count * one.bytes / chip.link
    passes = 2 if one.kind == "all-reduce" else 1
    return one.count * passes * one.bytes / (2 * chip.link)
