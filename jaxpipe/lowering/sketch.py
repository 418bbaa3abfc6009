"""A program without slots: which op each rank runs in which tick, what travels when, and how the ticks are folded.

That is all that decides how long a step takes. Slots come on top (`lower`).
"""

from jaxpipe.lowering.channels import Ticks, channels, messages
from jaxpipe.lowering.period import Traffic, fold
from jaxpipe.lowering.program import IDLE, Cell, Program
from jaxpipe.schedules import Schedule


def sketch(schedule: Schedule, ticks: Ticks) -> Program:
    """The program that runs `schedule` with each op in the tick that `ticks` says."""
    routed = messages(schedule, ticks)
    carriers = channels(routed)
    channel_of = {(c.value, edge): number for number, c in enumerate(carriers) for edge in c.edges}
    grid = [[Cell() for _ in range(schedule.num_ranks)] for _ in range(1 + max(ticks.values()))]
    for (kind, stage, micro_batch), tick in ticks.items():
        grid[tick][schedule.placement[stage]] = Cell(kind, stage, micro_batch)
    traffic: list[set[Traffic]] = [set() for _ in grid]
    for message in routed:
        traffic[message.sent].add((channel_of[message.value, message.edge], message.edge))
    frozen = tuple(map(frozenset, traffic))
    kinds = [frozenset(cell.kind for cell in row if cell.kind != IDLE) for row in grid]
    nothing = (0,) * schedule.num_ranks
    return Program(
        schedule=schedule,
        cells=tuple(map(tuple, grid)),
        channels=carriers,
        traffic=frozen,
        loops=fold(kinds, frozen),
        pools={},
        inboxes={},
        saved_per_rank=nothing,
        pending_per_rank=nothing,
        saved_until_w=False,
        direct=frozenset(),
    )
