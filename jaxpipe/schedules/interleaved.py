"""Interleaved 1F1B: several stages per rank, so that the pipeline fills and drains with a part of a rank's work at a time.

    rank 0 | 0F0 ..  0F1 ..  2F0 ..  2F1 ..  0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 ..  2B2 ..  2B3 ..  0B2 ..  0B3
    rank 1 | ..  ..  1F0 ..  1F1 ..  3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 ..  1B2 ..  1B3 ..  ..

Here two ranks have two chunks each: stages 0 and 2 on rank 0, 1 and 3 on rank 1. With p ranks and v chunks a micro-batch
goes round the ranks v times, in a group of at least p (`chunk_order.py`). As in eager 1F1B, even columns hold forwards and
odd columns backwards. If rank 0 can run the forward of a chunk and a micro-batch in column 2k, rank r runs it in column
2(k + r). Backwards come in the same order with chunks from the last one, in columns 2(T + k + p-1-r) + 1, where
T = (v-1)N + p-1 is when the last rank runs the first forward of its last chunk, and N the size of the largest group:
ceil(m / floor(m/p)) for m micro-batches, which is p if p divides m.

The bubble is (p-1)(F+B)/v for m >= p. It is the same with a barrier after every tick, because no tick mixes F and B. With
m < p a group is too short to come round in time, and the bubble is ((p-m)v + m-1)(F+B)/v. That is the least possible: the
last micro-batch begins (m-1)F/v late and takes pF, and backwards likewise. Rank 0 holds most, at most
min(m, ((v-1)N + 2(p-1) + 1)/v) micro-batches. Between ranks v times as many values travel as in 1F1B.

Reference: Narayanan et al., https://arxiv.org/abs/2104.04473. The order is theirs, and so is the warm-up of
2(p-1-r) + (v-1)N forwards. In the paper p divides m; their code lets the last group be a short one, where here groups are
made a little larger.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.chunk_order import count_ranks, in_a_loop, visits
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


def interleaved(num_stages: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """Makes interleaved 1F1B of `num_stages` stages on `num_stages / num_chunks` ranks, with stage s on rank s mod ranks.

    Raises:
      ScheduleError: a count is no integer of at least 1, or `num_chunks` does not divide `num_stages`.
    """
    num_stages, num_micro_batches, num_chunks = check_positive(
        num_stages=num_stages, num_micro_batches=num_micro_batches, num_chunks=num_chunks
    )
    num_ranks = count_ranks(num_stages, num_chunks)
    order = visits(num_ranks, num_micro_batches, num_chunks)
    turn = next(time for time, (chunk, _) in order if chunk == num_chunks - 1) + num_ranks - 1
    tick_of: dict[Op, int] = {}
    for time, (chunk, micro_batch) in order:
        for rank in range(num_ranks):
            forward = Op("F", chunk * num_ranks + rank, micro_batch)
            backward = Op("B", (num_chunks - 1 - chunk) * num_ranks + rank, micro_batch)
            tick_of[forward] = 2 * (time + rank)
            tick_of[backward] = 2 * (turn + time + num_ranks - 1 - rank) + 1
    return Schedule.from_ticks(tick_of, placement=in_a_loop(num_stages, num_ranks))
