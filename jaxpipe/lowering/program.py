"""`Program`: the narrow waist between thinking about a schedule and running it. Integers only."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxpipe.lowering.channels import DX, Channel, Y
from jaxpipe.lowering.period import Edge, Loop, Traffic
from jaxpipe.schedules import Schedule

IDLE = "."
# The pools: what a forward keeps for its backward, and what the first half of a backward, I, keeps for the second one, W.
SAVED = "saved"
PENDING = "pending"


class Cell(NamedTuple):
    """What one rank does in one tick. A slot of -1 means: none.

    Attributes:
      kind: "F", "B", "I", "W", or "." for idle.
      stage, micro_batch: of the op.
      slots: per pool of the program, the slot that the op uses (of the pool "saved": F writes it, B or I reads it; of the
        pool "pending": I writes it, W reads it). () means none of any pool.
      read: the arrival slot of the op's incoming message.
      arrive: per channel of the program, the arrival slot for the message that this tick's permute brings. () means none
        of any channel.
    """

    kind: str = IDLE
    stage: int = -1
    micro_batch: int = 0
    slots: tuple[int, ...] = ()
    read: int = -1
    arrive: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A schedule made ready to run: one `Cell` per tick and rank, buffer sizes, and the loops that fold the ticks.

    Attributes:
      cells: `cells[tick][rank]`.
      channels: what permutes carry; everything about channels is in this order.
      traffic: per tick, which edges of which channel carry data.
      loops: which ticks run in which compiled loop.
      pools: the buffers of values that a rank keeps between two of its ops, with the number of slots of each: the largest
        need of any rank. Cells have their slots in this order.
      inboxes: per kind of value that arrives, the number of arrival slots: again the largest need of any rank.
      saved_per_rank, pending_per_rank: how many slots of the pools "saved" and "pending" each rank really uses.
      direct: the kinds of values that are always read before the next permute that brings one.
    """

    schedule: Schedule
    cells: tuple[tuple[Cell, ...], ...]
    channels: tuple[Channel, ...]
    traffic: tuple[frozenset[Traffic], ...]
    loops: tuple[Loop, ...]
    pools: Mapping[str, int]
    inboxes: Mapping[str, int]
    saved_per_rank: tuple[int, ...]
    pending_per_rank: tuple[int, ...]
    direct: frozenset[str]

    @property
    def num_ticks(self) -> int:
        return len(self.cells)

    @property
    def num_ranks(self) -> int:
        return self.schedule.num_ranks

    def phase_edges(self, loop: Loop, phase: int, channel: int) -> tuple[Edge, ...]:
        """The edges of a channel that a phase of a loop permutes, in order."""
        return self._all_phase_edges[loop, phase, channel]

    @cached_property
    def _all_phase_edges(self) -> dict[tuple[Loop, int, int], tuple[Edge, ...]]:
        """Collected once: a table may have many thousand ticks."""
        found: dict[tuple[Loop, int, int], tuple[Edge, ...]] = {}
        silent: frozenset[Traffic] = frozenset()
        for loop in self.loops:
            for phase in range(loop.period):
                union = silent.union(*(self.traffic[t] for t in loop.phase_ticks(phase)))
                for number in range(len(self.channels)):
                    edges = sorted(edge for channel, edge in union if channel == number)
                    found[loop, phase, number] = tuple(edges)
        return found

    def phase_cells(self, loop: Loop, phase: int) -> Iterator[tuple[int, Cell]]:
        """Every (rank, cell) of a phase of a loop that is not idle."""
        for tick in loop.phase_ticks(phase):
            for rank, cell in enumerate(self.cells[tick]):
                if cell.kind != IDLE:
                    yield rank, cell

    def last_stage_slots(self) -> int:
        """The smallest K for which micro-batches that the last stage has in flight at once differ modulo K.

        So what it keeps of micro-batch m may lie in slot m mod K of K slots. In 1F1B that is 1.
        """
        last, live = self.schedule.num_stages - 1, set[int]()
        seen: set[frozenset[int]] = set()
        for cell in (cell for row in self.cells for cell in row if cell.stage == last):
            if cell.kind == "F":
                live.add(cell.micro_batch)
                seen.add(frozenset(live))
            elif cell.kind in ("B", "I"):
                live.remove(cell.micro_batch)
        return next(k for k in itertools.count(1) if all(len({m % k for m in some}) == len(some) for some in seen))

    def __str__(self) -> str:
        """The loops with what each phase does, then the cells.

        Where stages on one rank pass their values to each other, a phase shows "forward on rank 3".
        """
        chunks = f" x {self.schedule.num_chunks} chunks" if self.schedule.num_chunks > 1 else ""
        size = (
            f"{self.num_ranks} ranks{chunks} x {self.schedule.num_micro_batches} micro-batches, {self.num_ticks} ticks"
        )
        pending = f"{self.pools[PENDING]} pending, " if PENDING in self.pools else ""
        inboxes = f"{self.inboxes.get(Y, 0)} forward, {self.inboxes.get(DX, 0)} backward"
        lines = [f"{size}; slots: {self.pools.get(SAVED, 0)} saved, {pending}{inboxes}"]
        for loop in self.loops:
            lines.append(f"loop over ticks {loop.start}..{loop.stop - 1}, {loop.period} in the body")
            for phase in range(loop.period):
                kinds = sorted({cell.kind for _, cell in self.phase_cells(loop, phase)})
                moves: list[str] = []
                for number, channel in enumerate(self.channels):
                    if edges := self.phase_edges(loop, phase, number):
                        own = "on rank " if channel.is_local else ""
                        ways = " ".join(str(a) if channel.is_local else f"{a}>{b}" for a, b in edges)
                        moves.append(f"{channel.name} {own}{ways}")
                lines.append(f"  phase {phase}: ops {' '.join(kinds)}; permutes {', '.join(moves) or 'none'}")
        several = self.schedule.num_chunks > 1
        texts = [[_cell_text(cell, several) for cell in row] for row in self.cells]
        width = max(len(text) for row in texts for text in row)
        for rank in range(self.num_ranks):
            lines.append(f"rank {rank} | " + " ".join(row[rank].ljust(width) for row in texts).rstrip())
        return "\n".join(lines)


def _cell_text(cell: Cell, show_stage: bool) -> str:
    """`F3/1`: forward of micro-batch 3, slot 1; `2F3/1`: the same, of stage 2."""
    if cell.kind == IDLE:
        return "."
    stage = cell.stage if show_stage else ""
    return f"{stage}{cell.kind}{cell.micro_batch}" + "".join(f"/{slot}" for slot in cell.slots if slot >= 0)
