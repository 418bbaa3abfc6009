"""Forward only, for stages that lie on the ranks in any way: what evaluates a model where a training schedule has put it.

    rank 0 | 0F0 0F1 0F2 3F0 ..  3F1 ..  3F2
    rank 1 | ..  1F0 2F0 1F1 2F1 1F2 2F2 ..

This is a V: stages 0 and 3 on rank 0, stages 1 and 2 on rank 1.

Each tick, each rank runs an op whose input is there, if it has one: of the latest stage, and of that the earliest
micro-batch. The later the stage, the more others wait for it, and the fewer values wait in inboxes. On the loop of an
interleaved placement `forward_only(num_chunks=v)` is as short as can be, so that is taken there. This is a list schedule:
no rank is idle while it could run something (R. L. Graham, *Bounds on multiprocessing timing anomalies*, 1969).
"""

from collections.abc import Sequence

from jaxpipe.schedules.forward_only import forward_only
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule


def placed_forward_only(placement: Sequence[int], num_micro_batches: int) -> Schedule:
    """Makes the forwards of stages that lie on these ranks.

    Args:
      placement: the rank of each stage.
    """
    placement, num_ranks = tuple(placement), 1 + max(placement)
    num_stages = len(placement)
    if placement == tuple(stage % num_ranks for stage in range(num_stages)) and num_stages % num_ranks == 0:
        return forward_only(num_stages, num_micro_batches, num_stages // num_ranks)
    # Of each stage, which micro-batch comes next, and how many have come out of the stage before by the present tick.
    following, arrived = [0] * num_stages, [num_micro_batches, *[0] * (num_stages - 1)]
    stages_of = [[s for s in reversed(range(num_stages)) if placement[s] == rank] for rank in range(num_ranks)]
    tick_of: dict[Op, int] = {}
    tick = 0
    while len(tick_of) < num_stages * num_micro_batches:
        chosen = [next((s for s in mine if following[s] < arrived[s]), None) for mine in stages_of]
        for stage in chosen:
            if stage is not None:
                tick_of[Op("F", stage, following[stage])] = tick
                following[stage] += 1
                if stage + 1 < num_stages:
                    arrived[stage + 1] += 1
        tick += 1
    return Schedule.from_ticks(tick_of, placement)
