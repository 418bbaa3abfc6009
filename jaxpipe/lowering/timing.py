"""In which tick each op of a schedule runs.

A permute joins the ranks of every edge that its phase permutes. So it matters which ops share a tick: if one rank runs I
while its neighbour runs F or W, both take as long as I; and if any op may be in any tick, every edge is permuted in all of
them. The order of the ops on a rank is binding, their ticks are not. So where the columns of a table would make ranks wait,
the same order is laid out on patterns of ticks that allow some kinds of op only, and the one is taken that waits least. For
zero bubble (ZB-H1) that is 1F1B with I for B, and a tick of W behind each tick:

    rank 0 | F .  . .  F .  . .  F .  I W  F .  I W ...      even ranks run F while odd ones run I, and then the other
    rank 1 | .  .  F .  .  .  F .  I W  F .  I W  F . ...    way round: each tick permutes half of the edges

Nothing is sent in a tick of W, so that a transfer is under way beside it, and no rank waits for another one's W.
"""

import functools
import itertools
from collections.abc import Sequence

from jaxpipe.lowering.channels import Ticks, clock
from jaxpipe.lowering.pace import pace
from jaxpipe.lowering.program import Cell
from jaxpipe.lowering.sketch import sketch
from jaxpipe.schedules import Schedule, simulate

# What even and odd ranks may run in a tick, by letter. B is where I is.
_TICKS = {"F": ("F", "F"), "I": ("BI", "BI"), "W": ("W", "W"), "<": ("F", "BI"), ">": ("BI", "F")}
# Of all patterns of up to four ticks, and of six ticks without mixed ones, those that were best for some schedule of this
# package on four or eight ranks.
_PATTERNS = ("<W>W", "FIWFIW", "FWWI", "FIWIFW", "FIW", "<>", "FI")
# F, I, W of a block: where all three take the time of their products, and as the TPU compiler has them for a block that
# runs its forward again in I, and whose attention is most of the work.
_COSTS = ((0.9, 1.0, 0.8), (1.0, 3.5, 0.5))
# A tick costs something, and a table as it was written is preferred to one that is no faster to speak of.
_OVERHEAD, _FASTER = 0.01, 0.99


@functools.lru_cache(maxsize=16)
def timed(schedule: Schedule) -> Ticks:
    """The tick of every op, by (kind, stage, micro_batch)."""
    written = clock(schedule)
    if schedule.forward_only:
        return written
    best, least = written, _time(schedule, written) * _FASTER
    if least <= _bound(schedule):
        return written
    for pattern in _PATTERNS:
        if schedule.split_backward or "W" not in pattern:
            found = _laid_out(schedule, [_TICKS[letter] for letter in pattern])
            if found is not None and (time := _time(schedule, found)) < least:
                best, least = found, time
    return best


def _time(schedule: Schedule, ticks: Ticks) -> float:
    program = sketch(schedule, ticks)

    def total(forward: float, first: float, second: float) -> float:
        costs = {"F": forward, "B": first + second, "I": first, "W": second}

        def cost_of(cell: Cell) -> float:
            return costs[cell.kind]

        return pace(program, cost_of, _OVERHEAD).total

    return sum(itertools.starmap(total, _COSTS))


def _bound(schedule: Schedule) -> float:
    """What no ticks can be faster than."""
    chunks = schedule.num_chunks  # costs are those of an op here, and those of a whole rank there
    return sum(float(simulate(schedule, f * chunks, i * chunks, w * chunks).makespan) for f, i, w in _COSTS)


def _laid_out(schedule: Schedule, pattern: Sequence[tuple[str, str]]) -> Ticks | None:
    """The ops in their order, each in the first tick of the pattern that allows it; None if some never comes."""
    rows = [[op for op in row if op is not None] for row in schedule.rows]
    done = [0] * len(rows)
    found: Ticks = {}
    idle = 0
    for tick in itertools.count():
        allowed, here = pattern[tick % len(pattern)], [-1] * len(rows)
        for rank, row in enumerate(rows):
            if done[rank] < len(row) and row[done[rank]].kind in allowed[rank % 2]:
                needs = schedule.needs(row[done[rank]])
                if all(found.get((op.kind, op.stage, op.micro_batch), tick) < tick for op in needs):
                    here[rank] = done[rank]
        for rank, number in enumerate(here):
            if number >= 0:
                op = rows[rank][number]
                found[op.kind, op.stage, op.micro_batch] = tick
                done[rank] += 1
        if all(count == len(row) for count, row in zip(done, rows, strict=True)):
            return found
        idle = 0 if max(here) >= 0 else idle + 1
        if idle > len(pattern):
            return None
    raise AssertionError
