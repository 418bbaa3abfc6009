"""Schedule -> Program: the ticks, what travels in them, folded loops; then slots; then the program is checked."""

from collections.abc import Sequence
from dataclasses import replace

from jaxpipe.lowering.channels import VALUES, Channel, Message, Ticks, messages
from jaxpipe.lowering.period import Loop, Traffic
from jaxpipe.lowering.program import IDLE, PENDING, SAVED, Cell, Program
from jaxpipe.lowering.sketch import sketch
from jaxpipe.lowering.slots import colour
from jaxpipe.lowering.timing import timed
from jaxpipe.lowering.verify import verify
from jaxpipe.schedules import Schedule


def lower(schedule: Schedule, saved_until_w: bool = False) -> Program:
    """Makes the program that runs `schedule`.

    Args:
      saved_until_w: what a forward keeps stays where it is until W, if its backward is in two: W reads it, too. Otherwise I
        is the last one to read it.
    """
    ticks = timed(schedule)
    program = sketch(schedule, ticks)
    routed, carriers = messages(schedule, ticks), program.channels
    channel_of = {(c.value, edge): number for number, c in enumerate(carriers) for edge in c.edges}
    saved, saved_per_rank = _kept(schedule, ticks, ("F",), ("B", "W" if saved_until_w else "I"))
    pending, pending_per_rank = _kept(schedule, ticks, ("I",), ("W",))
    pools = {SAVED: max(saved_per_rank)} if saved else {}
    pools |= {PENDING: max(pending_per_rank)} if pending else {}
    arrival, inboxes = _arrival_slots(schedule, routed)

    def with_slots(cell: Cell) -> Cell:
        if cell.kind == IDLE:
            return cell
        kind, stage, micro_batch = cell.kind, cell.stage, cell.micro_batch
        uses = {SAVED: saved.get((stage, micro_batch), -1) if kind != "W" or saved_until_w else -1}
        uses[PENDING] = pending[stage, micro_batch] if kind in ("I", "W") else -1
        return cell._replace(slots=tuple(uses[pool] for pool in pools))

    grid = [[with_slots(cell) for cell in row] for row in program.cells]
    for message in routed:
        slot, channel = arrival[message], channel_of[message.value, message.edge]
        reader = grid[message.read][message.target]
        grid[message.read][message.target] = reader._replace(read=slot)
        lands = grid[message.sent][message.target]
        arrive = list(lands.arrive or (-1,) * len(carriers))
        arrive[channel] = slot
        grid[message.sent][message.target] = lands._replace(arrive=tuple(arrive))

    values = {value for value in inboxes if _is_direct(value, routed, carriers, program.loops, program.traffic)}
    program = replace(
        program,
        cells=tuple(map(tuple, grid)),
        pools=pools,
        inboxes=inboxes,
        saved_per_rank=tuple(saved_per_rank),
        pending_per_rank=tuple(pending_per_rank),
        saved_until_w=saved_until_w,
        direct=frozenset(values),
    )
    verify(program)
    return program


def _kept(
    schedule: Schedule, ticks: Ticks, writers: tuple[str, ...], readers: tuple[str, ...]
) -> tuple[dict[tuple[int, int], int], list[int]]:
    """The slot of what one op keeps for another one, by (stage, micro_batch), and how many slots each rank uses.

    Args:
      writers, readers: the kinds of these ops. A table has them for some micro-batches of some stages, or for none.
    """
    wrote = {(stage, m): tick for (kind, stage, m), tick in ticks.items() if kind in writers}
    read = {(stage, m): tick for (kind, stage, m), tick in ticks.items() if kind in readers}
    kept: dict[tuple[int, int], int] = {}
    per_rank = [0] * schedule.num_ranks
    for rank in range(schedule.num_ranks):
        intervals = {at: (wrote[at], tick) for at, tick in read.items() if schedule.placement[at[0]] == rank}
        slots, per_rank[rank] = colour(intervals)
        kept.update(slots)
    return kept, per_rank


def _arrival_slots(schedule: Schedule, routed: Sequence[Message]) -> tuple[dict[Message, int], dict[str, int]]:
    """The slot in which each message arrives, and per kind of value how many slots an inbox has."""
    arrival: dict[Message, int] = {}
    inboxes: dict[str, int] = {}
    for value in VALUES:
        for rank in range(schedule.num_ranks):
            inbox = [m for m in routed if m.target == rank and m.value == value]
            # A message occupies its slot from the end of tick `sent` until it is read; another may land in the same
            # slot at the end of the tick that reads it, because reading comes first.
            slots, used = colour({m: (m.sent, m.read - 1) for m in inbox})
            arrival.update(slots)
            if used:
                inboxes[value] = max(inboxes.get(value, 0), used)
    return arrival, inboxes


def _is_direct(
    value: str,
    routed: Sequence[Message],
    carriers: Sequence[Channel],
    loops: tuple[Loop, ...],
    traffic: tuple[frozenset[Traffic], ...],
) -> bool:
    """A permute hands zeros to the ranks it does not reach, so none may run between an arrival and its use."""
    permutes: set[int] = set()
    for loop in loops:
        for phase in range(loop.period):
            ticks = loop.phase_ticks(phase)
            if any(carriers[number].value == value for tick in ticks for number, _ in traffic[tick]):
                permutes.update(ticks)
    if sum(channel.value == value for channel in carriers) > 1:
        return False  # the permute of one channel would wipe out what another one has brought
    return all(
        permutes.isdisjoint(range(message.sent + 1, message.read)) for message in routed if message.value == value
    )
