"""ZBV: two stages per rank in the shape of a V, and the backward in two halves.

    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3 ..
    rank 1 | ..  1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3

Rank r holds stages r and 2p-1-r, so the last stage lies on rank 0 beside the first one, and the last rank hands its output
to itself. Rank r begins with 2(p-r)-1 forwards of its first stage; then r times a forward of the second stage and one of
the first; then p-r times F, I and W of the second stage. From then on it runs F, I, W of the first stage and F, I, W of the
second in turn for as long as there are forwards; then r times I of the first and of the second stage, p-r times I and W of
the first, and the rest of W.

That takes 2p-1 micro-batches. With fewer, but more than p, it is the order of 2p-1 without the last ones, and with less
than 3p/2 also without the first 3p/2 - m: trying all runs of m micro-batches in it has shown that to be best. With at most
p micro-batches memory is no concern, and each rank runs what is ready.

With p ranks and m micro-batches the bubble is (p-1)I/2 for F <= I, W <= I and m >= 2p-1, and below that at most
(p-1)(F+I) - (min(m,p)-1)W, the one of ZB-H1. No rank holds more than min(m, p) micro-batches.

Reference: Qi et al., https://arxiv.org/abs/2405.15362; the order is the one in `ScheduleZBVZeroBubble` of
torch.distributed.pipelining.
"""

from collections import Counter
from collections.abc import Iterable
from typing import cast

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.op import Kind, Op
from jaxpipe.schedules.split_order import rows_as_ready
from jaxpipe.schedules.table import Schedule


def zbv(num_stages: int, num_micro_batches: int) -> Schedule:
    """Makes ZBV on `num_stages / 2` ranks. Rank r holds stages r and num_stages - 1 - r.

    Raises:
      ScheduleError: a count is no integer of at least 1, or `num_stages` is odd.
    """
    num_stages, num_micro_batches = check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    if num_stages % 2:
        raise ScheduleError(
            f"num_stages={num_stages}: this schedule has two stages on every rank, and num_stages counts all. Use "
            f"num_stages={num_stages + 1}."
        )
    num_ranks = num_stages // 2
    placement = (*range(num_ranks), *reversed(range(num_ranks)))
    if num_micro_batches <= num_ranks:
        return Schedule.from_order(rows_as_ready(placement, num_micro_batches), placement)
    enough = max(num_micro_batches, 2 * num_ranks - 1)
    first = max(0, 3 * num_ranks // 2 - num_micro_batches)
    rows = [
        [
            Op(op.kind, op.stage, op.micro_batch - first)
            for op in _row(rank, num_ranks, enough)
            if op.micro_batch in range(first, first + num_micro_batches)
        ]
        for rank in range(num_ranks)
    ]
    return Schedule.from_order(rows, placement)


def _row(rank: int, num_ranks: int, num_micro_batches: int) -> list[Op]:
    first, second = rank, 2 * num_ranks - 1 - rank
    row: list[Op] = []
    done: Counter[tuple[Kind, int]] = Counter()

    def run(kinds: str, stage: int) -> None:
        for kind in cast(Iterable[Kind], kinds):
            row.append(Op(kind, stage, done[kind, stage]))
            done[kind, stage] += 1

    for _ in range(2 * (num_ranks - rank) - 1):
        run("F", first)
    for _ in range(rank):
        run("F", second)
        run("F", first)
    for _ in range(num_ranks - rank):
        run("FIW", second)
    while done["F", second] < num_micro_batches:
        run("FIW" if done["F", first] < num_micro_batches else "IW", first)
        run("FIW", second)
    for _ in range(rank):
        run("I", first)
        run("I", second)
    for _ in range(num_ranks - rank):
        run("IW", first)
    for stage in (second, first):
        run("W" * (num_micro_batches - done["W", stage]), stage)
    return row
