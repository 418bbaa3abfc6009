"""Which value travels to which rank, when, and over which channel."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpipe.lowering.period import Edge
from jaxpipe.schedules import Schedule

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
    """The edges that one permute serves, for one kind of value. They form no cycle: XLA miscompiles permutes that do.

    All channels of a value bring what they carry into the same arrival slots, so whoever reads need not know them.
    """

    value: str
    edges: frozenset[Edge]

    @property
    def name(self) -> str:
        """How programs show it: "forward" for channels that carry outputs, "backward" for gradients."""
        return {Y: "forward", DX: "backward"}[self.value]


def clock(schedule: Schedule) -> dict[tuple[str, int, int], int]:
    """The tick of every op, by (kind, stage, micro_batch)."""
    return {
        (op.kind, op.stage, op.micro_batch): tick
        for row in schedule.ticks
        for tick, op in enumerate(row)
        if op is not None
    }


def messages(schedule: Schedule) -> list[Message]:
    """Every value that one op makes and an op of the neighbouring stage reads."""
    ticks = clock(schedule)
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
    """The channels that carry these messages: with stage s on rank s, one for each kind of value that travels."""
    edges: dict[str, set[Edge]] = {}
    for message in routed:
        edges.setdefault(message.value, set()).add(message.edge)
    return tuple(Channel(value, frozenset(edges[value])) for value in VALUES if value in edges)
