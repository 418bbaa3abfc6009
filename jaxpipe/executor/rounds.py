"""When a rank runs which group of rows, in a loop in which the groups go through all stages again and again.

A group runs a stage per tick, without a pause, and what it has made is read in the next tick; so all is said by the tick in
which each group begins. Every group begins anew after `period` ticks, when what its last stage has made has come back. With
S ranks there are S groups, and a period has at least as many ticks as S groups have work for the rank with the most stages:
that is enough for one stage per rank, for stages that go round the ranks, and for a V (two stages per rank):

    rank 0 | a0 b1' ...       S = 2, stages 0 to 3 on ranks 0 1 1 0, groups a and b
    rank 1 | b... a1 a2 ...   a begins in tick 0, b in tick 2; the period has 4 ticks

For other placements the period may have to be longer, and some ticks of some ranks are idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpipe.lowering.channels import paths
from jaxpipe.lowering.period import Edge


@dataclass(frozen=True)
class Way:
    """One permute, or what stays on its rank.

    Attributes:
      edges: from rank to rank; () for what stays.
    """

    edges: tuple[Edge, ...]

    @property
    def stays(self) -> bool:
        """Whether nothing is permuted."""
        return not self.edges


@dataclass(frozen=True)
class Rounds:
    """The work of all ranks.

    Attributes:
      placement: the rank of each stage.
      period: ticks from a turn of a group to the next one.
      starts: per group, the tick in which its first turn begins.
      table: [period][ranks]: the group that a rank runs in that tick of each period; -1 for none.
      ways: on which a message may travel.
      way_to: per stage, the number of the way on which its input comes; 0 for the first one, which has none.
    """

    placement: tuple[int, ...]
    period: int
    starts: tuple[int, ...]
    table: tuple[tuple[int, ...], ...]
    ways: tuple[Way, ...]
    way_to: tuple[int, ...]

    @classmethod
    def of(cls, placement: Sequence[int]) -> "Rounds":
        """That of stages on these ranks, all of which have at least one."""
        placement = tuple(placement)
        ranks = 1 + max(placement)
        period = max(len(placement), ranks * max(placement.count(rank) for rank in range(ranks)))
        while (starts := _starts(placement, period, ranks)) is None:
            period += 1
        table = [[-1] * ranks for _ in range(period)]
        for group, start in enumerate(starts):
            for stage, rank in enumerate(placement):
                assert table[(start + stage) % period][rank] == -1
                table[(start + stage) % period][rank] = group
        edges = list(zip(placement[:-1], placement[1:], strict=True))
        ways = [Way(tuple(sorted(group))) for group in paths({(a, b) for a, b in edges if a != b})]
        if any(a == b for a, b in edges):
            ways.append(Way(()))
        way_to = [next(n for n, way in enumerate(ways) if edge in way.edges or way.stays) for edge in edges]
        return cls(placement, period, starts, tuple(map(tuple, table)), tuple(ways), (0, *way_to))

    def num_ticks(self, turns: int) -> int:
        """From the first turn of the first group to the end of the last turn of the last one."""
        return max(self.starts) + (turns - 1) * self.period + len(self.placement) if turns else 0

    def place_on_rank(self, stage: int) -> int:
        """Which of the stages of its rank this one is, from 0."""
        return self.placement[:stage].count(self.placement[stage])


def _starts(placement: Sequence[int], period: int, groups: int) -> tuple[int, ...] | None:
    """The first ticks in which groups can begin so that no rank has two of them at once; None if there are too few."""
    taken: set[int] = set()  # how much later another group must not begin
    for a, rank in enumerate(placement):
        taken |= {(a - b) % period for b, other in enumerate(placement) if other == rank}
    found: list[int] = []
    for tick in range(period):
        if all((tick - start) % period not in taken for start in found):
            found.append(tick)
    return tuple(found[:groups]) if len(found) >= groups else None
