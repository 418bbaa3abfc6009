"""GPipe: all forwards, then all backwards. It is the simplest table, and keeps every micro-batch.

    rank 0 | F0 F1 F2 F3 F4 F5 .. .. .. .. .. .. B0 B1 B2 B3 B4 B5
    rank 1 | .. F0 F1 F2 F3 F4 F5 .. .. .. .. B0 B1 B2 B3 B4 B5 ..
    rank 2 | .. .. F0 F1 F2 F3 F4 F5 .. .. B0 B1 B2 B3 B4 B5 .. ..
    rank 3 | .. .. .. F0 F1 F2 F3 F4 F5 B0 B1 B2 B3 B4 B5 .. .. ..

With p ranks and m micro-batches, F of stage s and micro-batch i is at tick s + i, B at tick m + 2(p - 1) - s + i;
that makes 2(m + p - 1) ticks. The bubble is (p-1)(F+B), and every rank holds all m micro-batches at its peak.

Reference: Huang et al., https://arxiv.org/abs/1811.06965. The paper runs the backwards in reverse order; here they run
in micro-batch order, so that gradients are added in the same order as in every other schedule.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """Makes GPipe with one stage per rank."""
    num_stages, num_micro_batches = check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    num_forward_ticks = num_micro_batches + num_stages - 1
    tick_of: dict[Op, int] = {}
    for stage in range(num_stages):
        for micro_batch in range(num_micro_batches):
            tick_of[Op("F", stage, micro_batch)] = micro_batch + stage
            tick_of[Op("B", stage, micro_batch)] = num_forward_ticks + micro_batch + num_stages - 1 - stage
    return Schedule.from_ticks(tick_of, placement=tuple(range(num_stages)))
