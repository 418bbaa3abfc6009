"""Runs a program on labels instead of arrays: every value read was written by the right op and not overwritten."""

from jaxpipe.lowering.channels import DX, VALUES, Y
from jaxpipe.lowering.overlap import phase_kinds, place_of_arrival
from jaxpipe.lowering.period import Loop
from jaxpipe.lowering.program import PENDING, SAVED, Cell, Program

_BUG = "This is a bug in jaxpipe, please report it."
Label = tuple[str, int, int]  # (what it is, stage, micro_batch)
Slots = dict[tuple[int, int], int]  # arrival slots by (rank, channel)


def verify(program: Program) -> None:
    """Replays the tables tick by tick with the folded permutes of the compiled loop.

    Buffers hold labels such as ("y", stage, micro_batch). Raises AssertionError, naming tick and rank, at the first read
    of anything but the value the op needs, or when a rank keeps more or fewer values alive than its slots promise.
    """
    schedule, last = program.schedule, program.schedule.num_stages - 1
    ranks = range(program.num_ranks)
    kept = {pool: [dict[int, Label]() for _ in ranks] for pool in (SAVED, PENDING)}
    inboxes = {value: [dict[int, Label | None]() for _ in ranks] for value in VALUES}
    phase_of = {t: (loop, p) for loop in program.loops for p in range(loop.period) for t in loop.phase_ticks(p)}
    done: set[Label] = set()
    peak = {pool: [0] * program.num_ranks for pool in kept}

    # As in the loop, what was sent stays there until the next message of its kind.
    outbox = {value: dict[int, Label]() for value in VALUES}
    slots_before: Slots = {}
    phases = set(phase_of.values())
    kinds_of = {which: phase_kinds(program, *which) for which in phases}
    late_of = {which: _late(program, *which) for which in phases}
    for tick, row in enumerate(program.cells):
        now = loop, phase = phase_of[tick]
        before, kinds = (loop, (phase - 1) % loop.period), kinds_of[now]
        for place in range(len(kinds) + 1):
            for number in (number for number, at in late_of.get(before, {}).items() if at == place):
                # Permuted only now: it lies in the outbox for as long as it is under way.
                _permute(program, before, number, outbox, inboxes, slots_before)
            for rank, cell in enumerate(row):
                if place == len(kinds) or cell.kind != kinds[place]:
                    continue
                stage, m = cell.stage, cell.micro_batch
                where = f"tick {tick}, rank {rank}, {cell.kind}{m}"
                assert (cell.kind, stage, m) not in done, f"{where}: done twice. {_BUG}"
                done.add((cell.kind, stage, m))
                if cell.kind == "F":
                    if stage > 0:
                        found = inboxes[Y][rank].get(cell.read)
                        assert found == (Y, stage - 1, m), f"{where}: reads {found} from slot {cell.read}. {_BUG}"
                    outbox[Y][rank] = (Y, stage, m)
                elif cell.kind != "W":
                    if stage < last:
                        found = inboxes[DX][rank].get(cell.read)
                        assert found == (DX, stage + 1, m), f"{where}: reads {found} from slot {cell.read}. {_BUG}"
                    outbox[DX][rank] = (DX, stage, m)
                own = dict(zip(program.pools, cell.slots, strict=True))
                for pool, boxes in kept.items():
                    _use(pool, own.get(pool), boxes[rank], cell, where)
                    peak[pool][rank] = max(peak[pool][rank], len(boxes[rank]))
        slots = {(rank, number): at for rank, cell in enumerate(row) for number, at in enumerate(cell.arrive)}
        for number in range(len(program.channels)):
            if number not in late_of[now]:
                _permute(program, now, number, outbox, inboxes, slots)
        slots_before = slots

    for pool, promised in ((SAVED, program.saved_per_rank), (PENDING, program.pending_per_rank)):
        assert tuple(peak[pool]) == promised, f"keeps {peak[pool]} {pool} values, has {promised} slots. {_BUG}"
    wanted = sum(op is not None for row in schedule.rows for op in row)
    assert len(done) == wanted, f"{len(done)} of {wanted} ops ran. {_BUG}"


def _use(pool: str, slot: int | None, kept: dict[int, Label], cell: Cell, where: str) -> None:
    """What an op does to the slots of a pool on its rank; `slot` is its own one, None if the program has no such pool."""
    writer, readers = {SAVED: ("F", "BI"), PENDING: ("I", "W")}[pool]
    label = (pool, cell.stage, cell.micro_batch)
    if cell.kind in readers:
        found = kept.pop(-1 if slot is None else slot, None)
        assert found == label, f"{where}: slot {slot} holds {found}. {_BUG}"
    elif cell.kind == writer and slot is not None:
        assert slot >= 0 and slot not in kept, f"{where}: slot {slot} is still in use. {_BUG}"
        kept[slot] = label
    else:
        assert slot in (None, -1), f"{where}: has slot {slot} of {pool}, and no use for it. {_BUG}"


def _late(program: Program, loop: Loop, phase: int) -> dict[int, int]:
    """The channels over which a phase sends late, and the place of the arrival."""
    channels = range(len(program.channels))
    found = {number: place_of_arrival(program, loop, phase, number) for number in channels}
    return {number: place for number, place in found.items() if place is not None}


def _permute(
    program: Program,
    when: tuple[Loop, int],
    channel: int,
    outbox: dict[str, dict[int, Label]],
    inboxes: dict[str, list[dict[int, Label | None]]],
    slots: Slots,
) -> None:
    """One permute: what lies in the outboxes arrives in these slots, by (rank, channel)."""
    value = program.channels[channel].value
    edges = program.phase_edges(*when, channel)
    arrivals = {target: outbox[value].get(source) for source, target in edges}
    for rank, box in enumerate(inboxes[value]):
        slot = slots.get((rank, channel), -1)
        if value in program.direct:
            if edges:
                box[0] = arrivals.get(rank)  # used as it arrives: every permute replaces it
        elif slot >= 0:
            box[slot] = arrivals.get(rank)
