"""Which value travels to which rank, when, and over which channel."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxpipe.lowering.period import Edge
from jaxpipe.schedules import Schedule

# The tick of every op, by (kind, stage, micro_batch).
Ticks = dict[tuple[str, int, int], int]

# What travels: the output of a stage, to the stage behind it; the gradient of a stage's input, to the stage before it.
Y, DX = "y", "dx"
VALUES = (Y, DX)


@dataclass(frozen=True)
class Message:
    """One value on its way to the op that reads it.

    Attributes:
      value: what travels, `Y` or `DX`.
      stage, micro_batch: those of the op that reads it.
      source, target: ranks.
      sent: the tick whose permute carries it. It lies in its arrival slot from the end of that tick.
      read: the tick at which it is read.
    """

    value: str
    stage: int
    micro_batch: int
    source: int
    target: int
    sent: int
    read: int

    @property
    def edge(self) -> Edge:
        return self.source, self.target


@dataclass(frozen=True)
class Channel:
    """The edges that one permute serves, for one kind of value. No two have the same source or the same target, and they
    form no cycle: XLA miscompiles permutes that do.

    All edges of a local channel lead from a rank to itself: two neighbouring stages are on it, and nothing is permuted.

    All channels of a value bring what they carry into the same arrival slots, so whoever reads need not know them.
    """

    value: str
    edges: frozenset[Edge]

    @property
    def is_local(self) -> bool:
        """Whether what it carries stays on its rank."""
        return any(source == target for source, target in self.edges)

    @property
    def name(self) -> str:
        """How programs show it: "forward" for channels that carry outputs, "backward" for gradients."""
        return {Y: "forward", DX: "backward"}[self.value]


def clock(schedule: Schedule) -> Ticks:
    """The ticks that are the columns of a table."""
    return {
        (op.kind, op.stage, op.micro_batch): tick
        for row in schedule.ticks
        for tick, op in enumerate(row)
        if op is not None
    }


def messages(schedule: Schedule, ticks: Ticks) -> list[Message]:
    """Every value that one op makes and an op of the neighbouring stage reads."""
    found: list[Message] = []
    for (kind, stage, micro_batch), tick in ticks.items():
        if kind == "F" and stage + 1 < schedule.num_stages:
            value, reader, reads = Y, stage + 1, ("F",)
        elif kind in ("B", "I") and stage > 0:
            value, reader, reads = DX, stage - 1, ("B", "I")
        else:
            continue
        read = next(ticks[k, reader, micro_batch] for k in reads if (k, reader, micro_batch) in ticks)
        source, target = schedule.placement[stage], schedule.placement[reader]
        found.append(Message(value, reader, micro_batch, source, target, tick, read))
    return found


def channels(routed: Sequence[Message]) -> tuple[Channel, ...]:
    """The channels that carry these messages, for each kind of value that travels: a local one for what stays on its rank,
    and behind it one per set of edges that a permute can serve."""
    found: list[Channel] = []
    for value in VALUES:
        edges = {message.edge for message in routed if message.value == value}
        own = frozenset((source, target) for source, target in edges if source == target)
        groups = [own] if own else []
        found += [Channel(value, group) for group in (*groups, *paths(edges - own))]
    return tuple(found)


def paths(edges: Iterable[Edge]) -> list[frozenset[Edge]]:
    """Deals edges to as few sets as it can find in which no source and no target occurs twice and nothing goes round.

    With stage s on rank s that is one set, (0, 1), (1, 2), ...; a loop of ranks needs one more for the edge that closes it,
    and a V one for each way. In general, it is at least the largest number of edges that leave a rank, or that reach one. A
    search tries that many and then more, and gives up after some steps in favour of the first set that an edge fits into.
    """
    # Short ways first, all of one direction: then neighbours share a set.
    order = sorted(edges, key=lambda edge: (abs(edge[1] - edge[0]), edge[1] < edge[0], edge))
    greedy: list[set[Edge]] = []
    for edge in order:
        fitting = next((group for group in greedy if _fits(group, edge)), None)
        if fitting is None:
            greedy.append({edge})
        else:
            fitting.add(edge)
    degrees = [sum(edge[end] == rank for edge in order) for end in (0, 1) for rank in {edge[end] for edge in order}]
    best: list[set[Edge]] | None = None
    for count in range(max(degrees, default=0), len(greedy)):
        if best is None:
            best = _dealt(order, count)
    return [frozenset(group) for group in (greedy if best is None else best)]


def _dealt(order: Sequence[Edge], count: int, steps: int = 5_000) -> list[set[Edge]] | None:
    """The edges dealt to so many sets, or None if that is impossible or was not found within so many steps."""
    groups: list[set[Edge]] = [set() for _ in range(count)]
    chosen: list[int] = []
    first = 0  # the first set to try for the next edge
    for _ in range(steps):
        if len(chosen) == len(order):
            return groups
        edge = order[len(chosen)]
        # Sets without edges are alike, so one of them is enough.
        empty = next((number for number, group in enumerate(groups) if not group), count - 1)
        fitting = [number for number in range(first, empty + 1) if _fits(groups[number], edge)]
        if fitting:
            groups[fitting[0]].add(edge)
            chosen.append(fitting[0])
            first = 0
        elif not chosen:
            return None
        else:
            last = chosen.pop()
            groups[last].remove(order[len(chosen)])
            first = last + 1
    return None


def _fits(group: set[Edge], edge: Edge) -> bool:
    """Whether a set of paths stays one with one more edge."""
    source, target = edge
    onward = dict(group)
    if source in onward or target in onward.values():
        return False
    while target in onward:
        target = onward[target]
    return target != source
