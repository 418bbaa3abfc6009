"""How long the ticks of a program take when the cost of each op is known: ranks wait where a permute makes them wait."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxpipe.hardware.structure import Op
from jaxpipe.lowering.program import IDLE, Cell, Program


@dataclass(frozen=True)
class Ticks:
    """What came out, in the unit of the costs.

    Attributes:
      total: from the first tick to the end of the last one.
      busy: per rank, the time of its ops.
    """

    total: float
    busy: tuple[float, ...]


def runs(program: Program, op_of: Callable[[Cell], Op]) -> list[dict[Op, int]]:
    """For each rank, how often it runs each op in a step."""
    found: list[dict[Op, int]] = [{} for _ in range(program.num_ranks)]
    for row in program.cells:
        for rank, cell in enumerate(row):
            if cell.kind != IDLE:
                op = op_of(cell)
                found[rank][op] = found[rank].get(op, 0) + 1
    return found


def ticks(
    program: Program,
    op_of: Callable[[Cell], Op],
    cost: Mapping[Op, float],
    overhead: float = 0.0,
    permute: float = 0.0,
) -> Ticks:
    """Walks through the ticks.

    A permute joins the ranks of an edge that its phase permutes, whether the edge carries data in that tick or not: both
    start the next tick when both have ended this one.

    Args:
      op_of: what the branch of a cell that is not idle runs.
      cost: of one run of each op.
      overhead: of each tick, on every rank.
      permute: of each tick in which a rank has an edge: the time of transfers that nothing is done beside.
    """
    ready = [0.0] * program.num_ranks
    busy = [0.0] * program.num_ranks
    for loop in program.loops:
        edges = [
            {
                edge
                for number, channel in enumerate(program.channels)
                for edge in program.phase_edges(loop, phase, number)
                if not channel.is_local
            }
            for phase in range(loop.period)
        ]
        for number, tick in enumerate(range(loop.start, loop.stop)):
            done: list[float] = []
            for rank, cell in enumerate(program.cells[tick]):
                time = 0.0 if cell.kind == IDLE else cost.get(op_of(cell), 0.0)
                busy[rank] += time
                done.append(ready[rank] + time + overhead)
            ready = list(done)
            for source, target in edges[number % loop.period]:
                met = max(done[source], done[target]) + permute
                ready[source], ready[target] = max(ready[source], met), max(ready[target], met)
    return Ticks(max(ready), tuple(busy))
