"""Schedule -> Program: clock, routes, slots, folded loops; then checked."""

from jaxpipe.errors import ScheduleError
from jaxpipe.lowering.channels import BACKWARD, FORWARD, Message, clock, messages
from jaxpipe.lowering.period import Edge, Loop, fold
from jaxpipe.lowering.program import IDLE, Cell, Program
from jaxpipe.lowering.slots import colour
from jaxpipe.lowering.verify import verify
from jaxpipe.schedules import Schedule


def lower(schedule: Schedule) -> Program:
    """Makes the program that runs `schedule`.

    Raises:
      ScheduleError: the table has features that the loop does not run yet (several stages per rank, split backward).
    """
    _check_supported(schedule)
    ticks = clock(schedule)
    num_ticks = 1 + max(ticks.values())
    routed = messages(schedule)

    saved: dict[tuple[int, int], int] = {}
    saved_per_rank = [0] * schedule.num_ranks
    if not schedule.forward_only:
        for rank in range(schedule.num_ranks):
            intervals = {
                (stage, m): (ticks["F", stage, m], ticks["B", stage, m])
                for stage in range(schedule.num_stages)
                if schedule.placement[stage] == rank
                for m in range(schedule.num_micro_batches)
            }
            slots, saved_per_rank[rank] = colour(intervals)
            saved.update(slots)

    arrival: dict[Message, int] = {}
    needed = {FORWARD: 0, BACKWARD: 0}
    for rank in range(schedule.num_ranks):
        for direction in needed:
            inbox = [m for m in routed if m.target == rank and m.direction == direction]
            # A message occupies its slot from the end of tick `sent` until it is read; another may land in the same
            # slot at the end of the tick that reads it, because reading comes first.
            slots, used = colour({m: (m.sent, m.read - 1) for m in inbox})
            arrival.update(slots)
            needed[direction] = max(needed[direction], used)

    grid = [[Cell() for _ in range(schedule.num_ranks)] for _ in range(num_ticks)]
    for (kind, stage, micro_batch), tick in ticks.items():
        cell = Cell(kind=kind, stage=stage, micro_batch=micro_batch, saved=saved.get((stage, micro_batch), -1))
        grid[tick][schedule.placement[stage]] = cell
    edges: list[set[tuple[str, Edge]]] = [set() for _ in range(num_ticks)]
    for message in routed:
        slot = arrival[message]
        reader = grid[message.read][message.target]
        grid[message.read][message.target] = reader._replace(read=slot)
        lands = grid[message.sent][message.target]
        grid[message.sent][message.target] = lands._replace(**{f"arrive_{message.direction}": slot})
        edges[message.sent].add((message.direction, (message.source, message.target)))

    frozen_edges = tuple(map(frozenset, edges))
    kinds = [frozenset(cell.kind for cell in row if cell.kind != IDLE) for row in grid]
    loops = fold(kinds, frozen_edges)
    program = Program(
        schedule=schedule,
        cells=tuple(map(tuple, grid)),
        edges=frozen_edges,
        loops=loops,
        saved_slots=max(saved_per_rank),
        forward_slots=needed[FORWARD],
        backward_slots=needed[BACKWARD],
        saved_per_rank=tuple(saved_per_rank),
        direct=frozenset(d for d in needed if _is_direct(d, routed, loops, frozen_edges)),
    )
    verify(program)
    return program


def _is_direct(
    direction: str,
    routed: list[Message],
    loops: tuple[Loop, ...],
    edges: tuple[frozenset[tuple[str, Edge]], ...],
) -> bool:
    """A permute hands zeros to the ranks it does not reach, so none may run between an arrival and its use."""
    permutes: set[int] = set()
    for loop in loops:
        for phase in range(loop.period):
            ticks = loop.phase_ticks(phase)
            if any(name == direction for tick in ticks for name, _ in edges[tick]):
                permutes.update(ticks)
    return all(
        permutes.isdisjoint(range(message.sent + 1, message.read))
        for message in routed
        if message.direction == direction
    )


def _check_supported(schedule: Schedule) -> None:
    if schedule.placement != tuple(range(schedule.num_ranks)):
        raise ScheduleError(
            f"The schedule places its stages on the ranks {schedule.placement}. This version runs one stage per rank, "
            f"stage s on rank s: {tuple(range(schedule.num_ranks))}."
        )
    if schedule.split_backward:
        raise ScheduleError(
            "The schedule splits the backward pass into I and W ops. This version runs F and B only; merge each I and "
            "its W into one B."
        )
