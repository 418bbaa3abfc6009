"""Runs a program on labels instead of arrays: every value read was written by the right op and not overwritten."""

from jaxpipe.lowering.channels import DX, VALUES, Y
from jaxpipe.lowering.program import IDLE, SAVED, Program

_BUG = "This is a bug in jaxpipe, please report it."
Label = tuple[str, int, int]  # (what it is, stage, micro_batch)


def verify(program: Program) -> None:
    """Replays the tables tick by tick with the folded permutes of the compiled loop.

    Buffers hold labels such as ("y", stage, micro_batch). Raises AssertionError, naming tick and rank, at the first read
    of anything but the value the op needs, or when a rank keeps more or fewer values alive than its slots promise.
    """
    schedule, last = program.schedule, program.schedule.num_stages - 1
    ranks = range(program.num_ranks)
    saved = [dict[int, Label]() for _ in ranks]
    inboxes = {value: [dict[int, Label | None]() for _ in ranks] for value in VALUES}
    phase_of = {t: (loop, p) for loop in program.loops for p in range(loop.period) for t in loop.phase_ticks(p)}
    pool = list(program.pools).index(SAVED) if SAVED in program.pools else None
    done: set[Label] = set()
    peak = [0] * program.num_ranks

    for tick, row in enumerate(program.cells):
        outbox: dict[str, dict[int, Label]] = {value: {} for value in VALUES}
        for rank, cell in enumerate(row):
            if cell.kind == IDLE:
                continue
            stage, m = cell.stage, cell.micro_batch
            where = f"tick {tick}, rank {rank}, {cell.kind}{m}"
            assert (cell.kind, stage, m) not in done, f"{where}: done twice. {_BUG}"
            done.add((cell.kind, stage, m))
            slot = -1 if pool is None else cell.slots[pool]
            if cell.kind == "F":
                if stage > 0:
                    found = inboxes[Y][rank].get(cell.read)
                    assert found == (Y, stage - 1, m), f"{where}: reads {found} from slot {cell.read}. {_BUG}"
                outbox[Y][rank] = (Y, stage, m)
                if slot >= 0:
                    assert slot not in saved[rank], f"{where}: slot {slot} is still in use. {_BUG}"
                    saved[rank][slot] = (SAVED, stage, m)
                    peak[rank] = max(peak[rank], len(saved[rank]))
            else:
                if stage < last:
                    found = inboxes[DX][rank].get(cell.read)
                    assert found == (DX, stage + 1, m), f"{where}: reads {found} from slot {cell.read}. {_BUG}"
                kept = saved[rank].pop(slot, None)
                assert kept == (SAVED, stage, m), f"{where}: slot {slot} holds {kept}. {_BUG}"
                outbox[DX][rank] = (DX, stage, m)
        for number, channel in enumerate(program.channels):
            boxes = inboxes[channel.value]
            edges = program.phase_edges(*phase_of[tick], number)
            arrivals = {target: outbox[channel.value].get(source) for source, target in edges}
            for rank, cell in enumerate(row):
                slot = cell.arrive[number] if cell.arrive else -1
                if channel.value in program.direct:
                    if edges:
                        boxes[rank][0] = arrivals.get(rank)  # used as it arrives: every permute replaces it
                elif slot >= 0:
                    boxes[rank][slot] = arrivals.get(rank)

    assert tuple(peak) == program.saved_per_rank, f"keeps {peak} values, has {program.saved_per_rank} slots. {_BUG}"
    wanted = sum(op is not None for row in schedule.rows for op in row)
    assert len(done) == wanted, f"{len(done)} of {wanted} ops ran. {_BUG}"
