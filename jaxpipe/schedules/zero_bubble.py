"""Zero bubble with the memory of 1F1B (ZB-H1): the backward comes in two halves, and the second one fills the bubble.

    rank 0 | F0 F1 F2 F3 .. .. .. I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5
    rank 1 | .. F0 F1 F2 .. .. I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5
    rank 2 | .. .. F0 F1 .. I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5
    rank 3 | .. .. .. F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5

I computes the gradient of the stage's input, for which the rank before waits. W computes the gradients of the weights, for
which nobody waits. With p ranks and m micro-batches, rank r begins with p-1-r forwards. Then it runs for each micro-batch i
the next forward if there is one left, I of i, and once i >= r also W of i-r. The other W come last. So rank r has r
micro-batches between I and W, and holds at most min(m, p), as many as rank 0 in 1F1B.

The bubble is (p-1)(F+I) - (min(m,p)-1)W for W <= I, so (p-1)(F+I-W) for m >= p. The name is that of
the paper: without any bubble is only a variant that runs the optimizer step of some ranks before other ranks have ended.

Reference: Qi et al., https://arxiv.org/abs/2401.10241.
"""

from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.split_order import split_row
from jaxpipe.schedules.table import Schedule


def zero_bubble(num_stages: int, num_micro_batches: int) -> Schedule:
    """Makes ZB-H1 with one stage per rank, for any number of micro-batches."""
    num_stages, num_micro_batches = check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    rows: list[list[Op]] = []
    for rank in range(num_stages):
        each = [(rank, micro_batch) for micro_batch in range(num_micro_batches)]
        rows.append(split_row(each, each, ahead=num_stages - 1 - rank, behind=rank))
    return Schedule.from_order(rows, placement=tuple(range(num_stages)))
