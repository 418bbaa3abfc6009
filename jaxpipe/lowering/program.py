"""`Program`: the narrow waist between thinking about a schedule and running it. Integers only."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxpipe.lowering.channels import BACKWARD, FORWARD
from jaxpipe.lowering.period import Edge, Loop
from jaxpipe.schedules import Schedule

IDLE = "."


class Cell(NamedTuple):
    """What one rank does in one tick. A slot of -1 means: none.

    Attributes:
      kind: "F", "B", or "." for idle.
      stage, micro_batch: of the op.
      saved: slot that keeps what the forward saves for the backward (F writes it, B reads it).
      read: arrival slot of the op's incoming message (F: forward buffer, B: backward buffer).
      arrive_forward, arrive_backward: arrival slot for the message that this tick's permute brings.
    """

    kind: str = IDLE
    stage: int = -1
    micro_batch: int = 0
    saved: int = -1
    read: int = -1
    arrive_forward: int = -1
    arrive_backward: int = -1


@dataclass(frozen=True)
class Program:
    """A schedule made ready to run: one `Cell` per tick and rank, buffer sizes, and the loops that fold the ticks.

    Attributes:
      cells: `cells[tick][rank]`.
      edges: per tick, the (direction, (source, target)) pairs that carry data.
      loops: which ticks run in which compiled loop.
      saved_slots, forward_slots, backward_slots: sizes of the buffers, the largest need of any rank.
      saved_per_rank: saved slots that each rank really uses.
      direct: the directions in which every message is read before the next permute in that direction.
    """

    schedule: Schedule
    cells: tuple[tuple[Cell, ...], ...]
    edges: tuple[frozenset[tuple[str, Edge]], ...]
    loops: tuple[Loop, ...]
    saved_slots: int
    forward_slots: int
    backward_slots: int
    saved_per_rank: tuple[int, ...]
    direct: frozenset[str]

    @property
    def num_ticks(self) -> int:
        return len(self.cells)

    @property
    def num_ranks(self) -> int:
        return self.schedule.num_ranks

    def phase_edges(self, loop: Loop, phase: int, direction: str) -> tuple[Edge, ...]:
        """The edges that a phase of a loop permutes in one direction, in order."""
        return self._all_phase_edges[loop, phase, direction]

    @cached_property
    def _all_phase_edges(self) -> dict[tuple[Loop, int, str], tuple[Edge, ...]]:
        """Collected once: a table may have many thousand ticks."""
        found: dict[tuple[Loop, int, str], tuple[Edge, ...]] = {}
        silent: frozenset[tuple[str, Edge]] = frozenset()
        for loop in self.loops:
            for phase in range(loop.period):
                union = silent.union(*(self.edges[t] for t in loop.phase_ticks(phase)))
                for direction in (FORWARD, BACKWARD):
                    edges = sorted(edge for name, edge in union if name == direction)
                    found[loop, phase, direction] = tuple(edges)
        return found

    def is_direct(self, direction: str) -> bool:
        """Whether every message in `direction` is read before the next permute in that direction runs anywhere."""
        return direction in self.direct

    def phase_cells(self, loop: Loop, phase: int) -> Iterator[tuple[int, Cell]]:
        """Every (rank, cell) of a phase of a loop that is not idle."""
        for tick in loop.phase_ticks(phase):
            for rank, cell in enumerate(self.cells[tick]):
                if cell.kind != IDLE:
                    yield rank, cell

    def __str__(self) -> str:
        head = (
            f"{self.num_ranks} ranks x {self.schedule.num_micro_batches} micro-batches, {self.num_ticks} ticks; slots: "
            f"{self.saved_slots} saved, {self.forward_slots} forward, {self.backward_slots} backward"
        )
        lines = [head]
        for loop in self.loops:
            lines.append(f"loop over ticks {loop.start}..{loop.stop - 1}, {loop.period} in the body")
            for phase in range(loop.period):
                kinds = sorted({cell.kind for _, cell in self.phase_cells(loop, phase)})
                moves: list[str] = []
                for direction in (FORWARD, BACKWARD):
                    if edges := self.phase_edges(loop, phase, direction):
                        moves.append(f"{direction} {' '.join(f'{a}>{b}' for a, b in edges)}")
                lines.append(f"  phase {phase}: ops {' '.join(kinds)}; permutes {', '.join(moves) or 'none'}")
        width = max(len(_cell_text(cell)) for row in self.cells for cell in row)
        for rank in range(self.num_ranks):
            lines.append(
                f"rank {rank} | " + " ".join(_cell_text(row[rank]).ljust(width) for row in self.cells).rstrip()
            )
        return "\n".join(lines)


def _cell_text(cell: Cell) -> str:
    """`F3/1`: forward of micro-batch 3, saved slot 1."""
    if cell.kind == IDLE:
        return "."
    return f"{cell.kind}{cell.micro_batch}" + (f"/{cell.saved}" if cell.saved >= 0 else "")
