"""Looped breadth-first: GPipe with several stages per rank. All forwards of a chunk, then those of the next one.

    rank 0 | 0F0 0F1 0F2 0F3 2F0 2F1 2F2 2F3 ..  ..  2B0 2B1 2B2 2B3 0B0 0B1 0B2 0B3
    rank 1 | ..  1F0 1F1 1F2 1F3 3F0 3F1 3F2 3F3 3B0 3B1 3B2 3B3 1B0 1B1 1B2 1B3 ..

With p ranks, m micro-batches and v chunks per rank, stage s is chunk c = s // p of rank r = s mod p. Its forward of
micro-batch i is at tick cn + r + i with n = max(m, p), which is when the micro-batches come round. Backwards go the other
way from tick (v-1)n + m + p-1 on: (v-1-c)n + p-1-r + i later. The bubble is (p-1)(F+B)/v for m >= p and
((p-m)v + m-1)(F+B)/v for m < p, as in the interleaved schedule, and it is the same with a barrier after every tick. Every
rank holds all m micro-batches. In return a rank stays with one chunk for m ops.

Reference: Lamy-Poirier, https://arxiv.org/abs/2211.05953. As in GPipe, backwards run in the order of the micro-batches, and
not in reverse, so that gradients are added in the same order as in every other schedule.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.chunk_order import count_ranks, in_a_loop
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


def looped_bfs(num_stages: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """Makes the schedule of `num_stages` stages on `num_stages / num_chunks` ranks, with stage s on rank s mod ranks.

    Raises:
      ScheduleError: a count is no integer of at least 1, or `num_chunks` does not divide `num_stages`.
    """
    num_stages, num_micro_batches, num_chunks = check_positive(
        num_stages=num_stages, num_micro_batches=num_micro_batches, num_chunks=num_chunks
    )
    num_ranks = count_ranks(num_stages, num_chunks)
    once_round = max(num_micro_batches, num_ranks)
    num_forward_ticks = (num_chunks - 1) * once_round + num_micro_batches + num_ranks - 1
    tick_of: dict[Op, int] = {}
    for stage in range(num_stages):
        chunk, rank = divmod(stage, num_ranks)
        forward = chunk * once_round + rank
        backward = num_forward_ticks + (num_chunks - 1 - chunk) * once_round + num_ranks - 1 - rank
        for micro_batch in range(num_micro_batches):
            tick_of[Op("F", stage, micro_batch)] = forward + micro_batch
            tick_of[Op("B", stage, micro_batch)] = backward + micro_batch
    return Schedule.from_ticks(tick_of, placement=in_a_loop(num_stages, num_ranks))
