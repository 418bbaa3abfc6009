"""Interleaved zero bubble: several stages per rank, and the backward in two halves. The bubble of ZB-H1, divided by v.

    rank 0 | 0F0 0F1 2F0 2F1 ..  2I0 2W0 0F2 2I1 2W1 0F3 0I0 0W0 2F2 0I1 0W1 2F3 2I2 2W2 2I3 2W3 0I2 0W2 0I3 0W3
    rank 1 | ..  1F0 1F1 3F0 3I0 3F1 3I1 3W0 1F2 1I0 3W1 1F3 1I1 1W0 3F2 3I2 1W1 3F3 3I3 3W2 1I2 3W3 1I3 1W2 1W3

With p ranks and v chunks per rank, stage s on rank s mod p, micro-batches go round the ranks in groups of at least p, as in
the interleaved schedule (`chunk_order.py`). Rank r begins with (v-1)N + p-1-r forwards, where N is the size of the largest
group: ceil(m / floor(m/p)) for m micro-batches, and p if p divides m. Then it runs in turn the next forward if there is one
left, the next I, and W once it is r backwards behind. The other W come last.

The bubble is (p-1)(F+I-W)/v for m >= p and W <= I. No rank holds more than min(m, ((v-1)N + p)/v) micro-batches: if p
divides m, as many as rank 0 in 1F1B. With m < p the bubble is at most that of the interleaved schedule.

Reference: the order is that of `ScheduleInterleavedZeroBubble` in torch.distributed.pipelining, for m that p divides; the
halves of the backward are those of https://arxiv.org/abs/2401.10241.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.chunk_order import count_ranks, groups, in_a_loop, visits
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.split_order import split_row
from jaxpipe.schedules.table import Schedule


def interleaved_zero_bubble(num_stages: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """Makes the schedule of `num_stages` stages on `num_stages / num_chunks` ranks, with stage s on rank s mod ranks.

    Raises:
      ScheduleError: a count is no integer of at least 1, or `num_chunks` does not divide `num_stages`.
    """
    num_stages, num_micro_batches, num_chunks = check_positive(
        num_stages=num_stages, num_micro_batches=num_micro_batches, num_chunks=num_chunks
    )
    num_ranks = count_ranks(num_stages, num_chunks)
    order = [visit for _, visit in visits(num_ranks, num_micro_batches, num_chunks)]
    largest = len(groups(num_ranks, num_micro_batches)[0])
    rows: list[list[Op]] = []
    for rank in range(num_ranks):
        forwards = [(chunk * num_ranks + rank, micro_batch) for chunk, micro_batch in order]
        backwards = [((num_chunks - 1 - chunk) * num_ranks + rank, micro_batch) for chunk, micro_batch in order]
        ahead = (num_chunks - 1) * largest + num_ranks - 1 - rank
        rows.append(split_row(forwards, backwards, ahead=ahead, behind=rank))
    return Schedule.from_order(rows, placement=in_a_loop(num_stages, num_ranks))
