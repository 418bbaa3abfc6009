"""Eager 1F1B: forwards run up to twice as far ahead, so that all ranks do the same kind of op in the same tick.

    rank 0 | F0 .. F1 .. F2 .. F3 .. .. .. .. .. .. B0 .. B1 .. B2 .. B3
    rank 1 | .. .. F0 .. F1 .. F2 .. F3 .. .. B0 .. B1 .. B2 .. B3 .. ..
    rank 2 | .. .. .. .. F0 .. F1 .. F2 B0 F3 B1 .. B2 .. B3 .. .. .. ..
    rank 3 | .. .. .. .. .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. .. .. .. .. ..

Column 2k holds the forwards: rank r runs micro-batch k - r. Column 2k + 1 holds the backwards: rank r runs micro-batch
k - 2(p-1) + r. With p ranks and m micro-batches there are m + 2(p-1) such pairs of columns, the bubble is (p-1)(F+B) as
in 1F1B, and rank r holds at most min(m, 2(p-1-r) + 1) micro-batches.

That memory buys two things. A barrier after every tick costs nothing, because no tick mixes F and B (1F1B loses about 21 %
to it when B = 2F). And a value travels one column before it is needed, so the transfer can overlap with computation.

References: 1F1B is https://arxiv.org/abs/2006.09503; the warm-up of 2(p-1-r) forwards is that of the interleaved
schedule of https://arxiv.org/abs/2104.04473, here without interleaving.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


def eager_one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """Makes eager 1F1B with one stage per rank. Even columns hold forwards only, odd columns backwards only."""
    num_stages, num_micro_batches = check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    tick_of: dict[Op, int] = {}
    for stage in range(num_stages):
        for micro_batch in range(num_micro_batches):
            tick_of[Op("F", stage, micro_batch)] = 2 * (micro_batch + stage)
            tick_of[Op("B", stage, micro_batch)] = 2 * (micro_batch + 2 * (num_stages - 1) - stage) + 1
    # Column 0 holds the first forward and the last column the last backward, so there are no idle columns to trim.
    return Schedule.from_ticks(tick_of, placement=tuple(range(num_stages)))
