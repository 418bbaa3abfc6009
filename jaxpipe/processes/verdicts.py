"""The rules that tell a fault from patience: plain functions of what all processes have said about themselves."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxpipe.processes.watchdog import Status, Waits

# Seconds.
# A process that has ended is not blamed before another one has waited for so long: its last words may be on the way.
SETTLE = 2.0
# After so long without a word the place where a process was seen last is told with its age.
FRESH = 5.0
MOST_NAMED = 8


class Seen(NamedTuple):
    """What is known about a process.

    Attributes:
      status: the last one that it has sent, or None.
      silent: seconds since it was heard of.
      ended: whether it has said that it ends as it should.
    """

    status: Status | None
    silent: float = 0.0
    ended: bool = False


class Verdict(NamedTuple):
    """Why all processes have to end, in whole sentences, and which processes are the cause."""

    culprits: tuple[int, ...]
    text: str


def judge(seen: Mapping[int, Seen], step_timeout: float) -> Verdict | None:
    """Whether some process waits in vain: for one that has ended, or for longer than the limit."""
    waits = {number: one.status.waits for number, one in seen.items() if one.status and one.status.waits}
    for number, work in waits.items():
        ended = [p for p in _late(work, seen) if p in seen and seen[p].ended]
        if ended and work.seconds >= SETTLE:
            return Verdict(
                (ended[0],),
                f"Process {ended[0]} has ended, and process {number} waits for it in {work.what}. All processes of a mesh "
                "have to make the same calls of train_batch, of evaluations and of checkpoints.",
            )
    return overdue(seen, step_timeout, timed=True)


def overdue(seen: Mapping[int, Seen], step_timeout: float, timed: bool) -> Verdict | None:
    """What has not finished for longer than the limit, of the works that have one or of the others, and because of whom."""
    waits = [one.status.waits for one in seen.values() if one.status and one.status.waits]
    waits = [work for work in waits if work.timed == timed and work.seconds > step_timeout]
    if not waits:
        return None
    work = max(waits, key=lambda work: work.seconds)
    late = {p: f"has not begun it, and has {where(seen.get(p))}" for p in _late(work, seen)}
    late |= {p: f"has {where(seen[p])}" for p in work.members if p not in late and p in silent(seen, FRESH)}
    text = f"{_capital(work.what)} has not finished for {work.seconds:.0f} s (step_timeout={step_timeout:g})"
    if not late:
        return Verdict(
            (),
            f"{text}, though all of its processes have begun it: the devices, or what connects them, do not finish it.",
        )
    named = "; ".join(f"process {p} {what}" for p, what in sorted(late.items())[:MOST_NAMED])
    more = f"; and {len(late) - MOST_NAMED} more" if len(late) > MOST_NAMED else ""
    return Verdict(tuple(sorted(late)), f"{text}: {named}{more}.")


def _late(work: Waits, seen: Mapping[int, Seen]) -> tuple[int, ...]:
    """The processes that have not begun a work."""
    statuses = {p: one.status or Status() for p, one in seen.items()}
    return tuple(p for p in work.members if statuses.get(p, Status()).count(work.members) < work.number)


def where(one: Seen | None) -> str:
    """Where a process "has been", such as "been in its data iterator for 12 s"."""
    if one is None or one.status is None:
        return "not been heard of at all"
    if one.silent > FRESH:
        return f"not been heard of for {one.silent:.0f} s; it was {one.status.place} then"
    return f"been {one.status.place} for {one.status.seconds + one.silent:.0f} s"


def silent(seen: Mapping[int, Seen], limit: float) -> list[int]:
    """The processes that were not heard of for so many seconds, and have not ended."""
    return [number for number, one in seen.items() if one.silent > limit and not one.ended]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
