"""Runs a program on labels instead of arrays: every value read was written by the right op and not overwritten."""

from jaxpipe.lowering.channels import BACKWARD, FORWARD
from jaxpipe.lowering.program import IDLE, Program

_BUG = "This is a bug in jaxpipe, please report it."


def verify(program: Program) -> None:
    """Replays the tables tick by tick with the folded permutes of the compiled loop.

    Buffers hold labels such as ("y", stage, micro_batch). Raises AssertionError, naming tick and rank, at the first read
    of anything but the value the op needs, or when a rank keeps more or fewer values alive than its slots promise.
    """
    schedule, last = program.schedule, program.schedule.num_stages - 1
    ranks = range(program.num_ranks)
    saved = [dict[int, object]() for _ in ranks]
    inbox = {FORWARD: [dict[int, object]() for _ in ranks], BACKWARD: [dict[int, object]() for _ in ranks]}
    phase_of = {t: (loop, p) for loop in program.loops for p in range(loop.period) for t in loop.phase_ticks(p)}
    done: set[tuple[str, int, int]] = set()
    peak = [0] * program.num_ranks

    for tick, row in enumerate(program.cells):
        outbox = {FORWARD: [None] * program.num_ranks, BACKWARD: [None] * program.num_ranks}
        for rank, cell in enumerate(row):
            if cell.kind == IDLE:
                continue
            stage, m = cell.stage, cell.micro_batch
            where = f"tick {tick}, rank {rank}, {cell.kind}{m}"
            assert (cell.kind, stage, m) not in done, f"{where}: done twice. {_BUG}"
            done.add((cell.kind, stage, m))
            if cell.kind == "F":
                if stage > 0:
                    found = inbox[FORWARD][rank].get(cell.read)
                    assert found == ("y", stage - 1, m), f"{where}: reads {found} from slot {cell.read}. {_BUG}"
                outbox[FORWARD][rank] = ("y", stage, m)  # type: ignore[call-overload]
                if cell.saved >= 0:
                    assert cell.saved not in saved[rank], f"{where}: slot {cell.saved} is still in use. {_BUG}"
                    saved[rank][cell.saved] = (stage, m)
                    peak[rank] = max(peak[rank], len(saved[rank]))
            else:
                if stage < last:
                    found = inbox[BACKWARD][rank].get(cell.read)
                    assert found == ("dx", stage + 1, m), f"{where}: reads {found} from slot {cell.read}. {_BUG}"
                found = saved[rank].pop(cell.saved, None)
                assert found == (stage, m), f"{where}: slot {cell.saved} holds {found}. {_BUG}"
                outbox[BACKWARD][rank] = ("dx", stage, m)  # type: ignore[call-overload]
        for direction, boxes in inbox.items():
            arrivals: list[object] = [None] * program.num_ranks
            edges = program.phase_edges(*phase_of[tick], direction)
            for source, target in edges:
                arrivals[target] = outbox[direction][source]
            for rank, cell in enumerate(row):
                slot = cell.arrive_forward if direction == FORWARD else cell.arrive_backward
                if program.is_direct(direction):
                    if edges:
                        boxes[rank][0] = arrivals[rank]  # used as it arrives: every permute replaces it
                elif slot >= 0:
                    boxes[rank][slot] = arrivals[rank]

    assert tuple(peak) == program.saved_per_rank, f"keeps {peak} values, has {program.saved_per_rank} slots. {_BUG}"
    wanted = sum(op is not None for row in schedule.rows for op in row)
    assert len(done) == wanted, f"{len(done)} of {wanted} ops ran. {_BUG}"
