"""One forward, one backward (1F1B): GPipe's bubble, but at most `num_stages - rank` micro-batches in flight.

    rank 0 | F0 .. F1 .. F2 .. F3 B0 F4 B1 F5 B2 .. B3 .. B4 .. B5
    rank 1 | .. F0 .. F1 .. F2 B0 F3 B1 F4 B2 F5 B3 .. B4 .. B5 ..
    rank 2 | .. .. F0 .. F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 .. B5 .. ..
    rank 3 | .. .. .. F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .. .. ..

With p ranks and m micro-batches, F of stage s and micro-batch i is at tick 2i + s, and B at tick 2i + 2p - 1 - s. There are
2(m + p - 1) ticks. The bubble is (p-1)(F+B), and rank r holds at most min(p-r, m) micro-batches.

References: PipeDream-Flush, Narayanan et al., https://arxiv.org/abs/2006.09503; the tick form, in which even ranks run
forwards while odd ranks run backwards, is that of DeepSpeed's pipeline engine, https://github.com/deepspeedai/DeepSpeed.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """Makes 1F1B with one stage per rank, for any number of micro-batches, also for fewer micro-batches than stages."""
    num_stages, num_micro_batches = check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    tick_of: dict[Op, int] = {}
    for stage in range(num_stages):
        for micro_batch in range(num_micro_batches):
            tick_of[Op("F", stage, micro_batch)] = 2 * micro_batch + stage
            tick_of[Op("B", stage, micro_batch)] = 2 * micro_batch + 2 * num_stages - 1 - stage
    return Schedule.from_ticks(tick_of, placement=tuple(range(num_stages)))
