"""Folds the tick table: which ticks share one piece of compiled code.

A loop body may hold several ticks (phases). Phase i of the body then knows which ops can occur in it and which edges
carry data, so it gets only those branches and permutes. 1F1B in parity form has period 2: on even ticks even ranks run F
while odd ranks run B, and each permute covers half of the edges. GPipe has period 1 and a cut in the middle: no forward
edge carries anything once the backward passes begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Edge = tuple[int, int]  # (source, target) ranks
Traffic = tuple[int, Edge]  # (number of the channel, edge) that carries data in a tick
_PERIODS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Loop:
    """`ticks[start:stop]` run as one compiled loop with `period` ticks in its body; the last body may run past `stop`."""

    start: int
    stop: int
    period: int

    @property
    def num_iterations(self) -> int:
        return -(-(self.stop - self.start) // self.period)

    def phase_ticks(self, phase: int) -> range:
        return range(self.start + phase, self.stop, self.period)


def fold(kinds: Sequence[frozenset[str]], edges: Sequence[frozenset[Traffic]]) -> tuple[Loop, ...]:
    """The loops that run a table.

    Args:
      kinds: per tick, which kinds of op occur.
      edges: per tick, the traffic: which edges of which channel carry data.
    """
    bounds = [0, *_cuts(kinds), len(kinds)]
    return tuple(
        Loop(start, stop, _period(kinds[start:stop], edges[start:stop]))
        for start, stop in zip(bounds, bounds[1:], strict=False)
        if stop > start
    )


def _cuts(kinds: Sequence[frozenset[str]]) -> list[int]:
    """Ticks before which and after which no kind of op is the same: cutting there duplicates no code."""
    first = {kind: tick for tick, row in reversed(list(enumerate(kinds))) for kind in row}
    last = {kind: tick for tick, row in enumerate(kinds) for kind in row}
    for cut in sorted(set(first.values())):
        before = [kind for kind in first if first[kind] < cut]
        if before and all(last[kind] < cut for kind in before):
            return [cut]
    return []


def _period(kinds: Sequence[frozenset[str]], edges: Sequence[frozenset[Traffic]]) -> int:
    """How many ticks a body has: more than one where that permutes at least a quarter fewer edges per tick.

    Each next choice has to save that much again, as it is more code, and one above 2 is run four times at least. If all ops
    are of one kind, it is 1. What stays on its rank is not permuted, and does not count.
    """
    idle: frozenset[str] = frozenset()
    if len(idle.union(*kinds)) < 2:
        return 1
    silent: frozenset[Traffic] = frozenset()

    def edges_per_tick(period: int) -> float:
        phases = [silent.union(*edges[phase::period]) for phase in range(period)]
        return sum(source != target for phase in phases for _, (source, target) in phase) / period

    best, least = 1, edges_per_tick(1)
    for period in _PERIODS:
        edges_here = edges_per_tick(period)
        if (period == 2 or 4 * period <= len(kinds)) and least and edges_here <= 0.75 * least:
            best, least = period, edges_here
    return best
