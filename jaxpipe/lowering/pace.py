"""How long the ticks of a program take when the cost of each op is known: ranks wait where a permute makes them wait."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxpipe.lowering.overlap import phase_kinds, place_of_arrival
from jaxpipe.lowering.period import Edge, Loop
from jaxpipe.lowering.program import IDLE, Cell, Program


@dataclass(frozen=True)
class Pace:
    """What came out, in the unit of the costs.

    Attributes:
      total: from the first tick to the end of the last one.
      busy: per rank, the time of its ops.
    """

    total: float
    busy: tuple[float, ...]


@dataclass(frozen=True)
class _Phase:
    """The kinds of op of a phase in their order, and the edges that it permutes, by the place of their arrival in the next
    one; None: at once."""

    kinds: tuple[str, ...]
    edges: dict[int | None, list[Edge]]


def pace(program: Program, cost_of: Callable[[Cell], float], overhead: float = 0.0, permute: float = 0.0) -> Pace:
    """Walks through the ticks.

    A permute joins the ranks of an edge that its phase permutes, whether the edge carries data in that tick or not. Both go
    on when both have ended the tick. If the values arrive in a later place of the next tick (`overlap`), they run what is
    before it without waiting.

    Args:
      cost_of: of the op of a cell that is not idle.
      overhead: of each tick, on every rank.
      permute: of each tick in which a rank has an edge: the time of transfers that nothing is done beside.
    """
    time, busy = [0.0] * program.num_ranks, [0.0] * program.num_ranks
    for loop in program.loops:
        phases = [_phase(program, loop, number) for number in range(loop.period)]
        under_way: tuple[dict[int | None, list[Edge]], list[float]] = {}, time
        for number, tick in enumerate(range(loop.start, loop.stop)):
            phase, row = phases[number % loop.period], program.cells[tick]
            for place, kind in enumerate((*phase.kinds, IDLE)):
                _join(time, under_way[0].get(place, ()), under_way[1], permute)
                for rank, cell in enumerate(row):
                    if cell.kind == kind != IDLE:
                        cost = cost_of(cell)
                        time[rank] += cost
                        busy[rank] += cost
            time = [each + overhead for each in time]
            ended = list(time)
            _join(time, phase.edges.get(None, ()), ended, permute)
            under_way = phase.edges, ended
    return Pace(max(time), tuple(busy))


def _phase(program: Program, loop: Loop, number: int) -> _Phase:
    edges: dict[int | None, list[Edge]] = {}
    for channel, carrier in enumerate(program.channels):
        if not carrier.is_local:
            place = place_of_arrival(program, loop, number, channel)
            edges.setdefault(place, []).extend(program.phase_edges(loop, number, channel))
    return _Phase(phase_kinds(program, loop, number), edges)


def _join(time: list[float], edges: Sequence[Edge], ended: Sequence[float], permute: float) -> None:
    """Makes both ranks of each edge wait until both have ended the tick before."""
    for source, target in edges:
        met = max(ended[source], ended[target]) + permute
        time[source], time[target] = max(time[source], met), max(time[target], met)
