"""Forward only: the schedule of an evaluation. Nothing is kept for a backward, so memory does not grow with m.

    rank 0 | F0 F1 F2 F3 F4 F5 .. .. ..
    rank 1 | .. F0 F1 F2 F3 F4 F5 .. ..
    rank 2 | .. .. F0 F1 F2 F3 F4 F5 ..
    rank 3 | .. .. .. F0 F1 F2 F3 F4 F5

Rank r runs micro-batch t - r at tick t: m + p - 1 ticks and a bubble of (p-1)F, with p ranks and m micro-batches.

With v chunks per rank, stage s on rank s mod p (two ranks, two chunks):

    rank 0 | 0F0 0F1 2F0 2F1 0F2 0F3 2F2 2F3 ..
    rank 1 | ..  1F0 1F1 3F0 3F1 1F2 1F3 3F2 3F3

Micro-batches go round in groups: a group passes chunk 0, then chunk 1, and so on. A group of at least p micro-batches
returns to rank 0 just when rank 0 has finished the previous chunk, so no rank waits: there are m*v + p - 1 ticks of F/v
each, and a bubble of (p-1)F/v. If p does not divide m, the rest is spread over the groups. A short group at the end would
wait p - rest ticks per chunk. With m < p there is a single short group, which takes p*v + m - 1 ticks. That is the least
possible, because the last micro-batch takes that long.

References: the placement is that of https://arxiv.org/abs/2104.04473 (interleaved) and https://arxiv.org/abs/2211.05953
(looped); the two-buffer evaluation order for v = 1 is that of DeepSpeed, https://github.com/deepspeedai/DeepSpeed.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.chunk_order import count_ranks, in_a_loop, visits
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


def forward_only(num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """Makes the forwards of `num_stages` stages on `num_stages / num_chunks` ranks, with stage s on rank s mod ranks.

    Raises:
      ScheduleError: a count is no integer of at least 1, or `num_chunks` does not divide `num_stages`.
    """
    num_stages, num_micro_batches, num_chunks = check_positive(
        num_stages=num_stages, num_micro_batches=num_micro_batches, num_chunks=num_chunks
    )
    num_ranks = count_ranks(num_stages, num_chunks)
    tick_of: dict[Op, int] = {}
    for tick, (chunk, micro_batch) in visits(num_ranks, num_micro_batches, num_chunks):
        for rank in range(num_ranks):
            tick_of[Op("F", chunk * num_ranks + rank, micro_batch)] = tick + rank
    return Schedule.from_ticks(tick_of, placement=in_a_loop(num_stages, num_ranks))
