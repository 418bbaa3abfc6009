"""Which value crosses which edge at which tick."""

from dataclasses import dataclass

from jaxpipe.schedules import Schedule

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Message:
    """One value on its way to the op that reads it.

    Attributes:
      direction: "forward" carries activations to `stage`, "backward" carries gradients to it.
      stage, micro_batch: the op that reads the value.
      source, target: ranks.
      sent: tick whose permute carries it; it lies in its arrival slot from the end of that tick.
      read: tick at which it is consumed.
    """

    direction: str
    stage: int
    micro_batch: int
    source: int
    target: int
    sent: int
    read: int


def clock(schedule: Schedule) -> dict[tuple[str, int, int], int]:
    """Tick of every op, by (kind, stage, micro_batch)."""
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
            direction, reader, reads = FORWARD, stage + 1, ("F",)
        elif kind in ("B", "I") and stage > 0:
            direction, reader, reads = BACKWARD, stage - 1, ("B", "I")
        else:
            continue
        read = next(ticks[k, reader, micro_batch] for k in reads if (k, reader, micro_batch) in ticks)
        source, target = schedule.placement[stage], schedule.placement[reader]
        found.append(Message(direction, reader, micro_batch, source, target, tick, read))
    return found
