"""Computes how long a schedule takes and how much it keeps. Every figure about a schedule is derived, and none declared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from jaxpipe.checks import as_number, show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.clock import Cost, earliest_starts
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule

Sync = Literal["none", "neighbour", "global"]
SYNCS: tuple[Sync, ...] = ("none", "neighbour", "global")


@dataclass(frozen=True)
class Timeline:
    """A schedule with a start and an end for every op. Times are in the unit of the costs that `simulate` was given.

    Attributes:
      schedule: the table.
      sync: what a rank waits for besides its inputs; see `simulate`.
      starts, ends: the time at which each op starts and ends.
      makespan: the time from 0 to the end of the last op.
      bubble: `makespan` minus the work of one rank, which is m(F+B), or m F if the table is forward-only.
      peak_live: for each rank, the largest number of micro-batches that it holds at once, in micro-batches of a whole rank:
        with v chunks per rank, one chunk counts 1/v. F begins to hold one, and the end of B or W gives it back. A
        forward-only table keeps nothing after the op, so there it is the 1/v that is being computed.
    """

    schedule: Schedule
    sync: Sync
    starts: Mapping[Op, Cost]
    ends: Mapping[Op, Cost]
    makespan: Cost
    bubble: Cost
    peak_live: tuple[int | Fraction, ...]

    @property
    def bubble_fraction(self) -> float:
        """The bubble as a part of the makespan, 0 to 1."""
        return float(self.bubble / self.makespan) if self.makespan else 0.0


def simulate(
    schedule: Schedule,
    forward: Cost = 1,
    backward_input: Cost = 1,
    backward_weight: Cost = 1,
    comm: Cost = 0,
    sync: Sync = "none",
) -> Timeline:
    """Computes when each op of a table starts and ends.

    The costs are those of one micro-batch on one whole rank, in any unit. With v chunks per rank (on the rank that has
    most), an op costs 1/v of that. Ints and Fractions are kept exact, and floats stay floats.

    `sync` says what else a rank waits for. The last two values walk through `schedule.ticks`:

    - `"none"`: nothing. An op starts when its rank is free and its inputs have arrived.
    - `"neighbour"`: before each tick, it waits for the previous tick of the ranks that it exchanges values with (ranks
      r - 1 and r + 1, and the wrap-around of a loop placement), also if that tick was idle. The `ppermute`s of a compiled
      loop wait in this way.
    - `"global"`: before each tick, it waits for the previous tick of all ranks, so a tick lasts as long as its slowest op.

    Args:
      schedule: the table.
      forward: the cost of F.
      backward_input: the cost of I. B costs `backward_input + backward_weight`.
      backward_weight: the cost of W.
      comm: the time that a value takes from one rank to another. It passes beside the computation.
      sync: see above.

    Raises:
      ScheduleError: a cost is negative or out of range, or `sync` is unknown.
    """
    if not isinstance(schedule, Schedule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ScheduleError(
            f"simulate({show(schedule)}): expected a Schedule, such as schedules.one_f_one_b(4, 8) makes."
        )
    forward, backward_input = _cost("forward", forward), _cost("backward_input", backward_input)
    backward_weight, comm = _cost("backward_weight", backward_weight), _cost("comm", comm)
    if sync not in SYNCS:
        raise ScheduleError(f"sync={show(sync)} is not known; use one of {', '.join(map(repr, SYNCS))}.")

    backward = backward_input + backward_weight
    cost_of = {
        kind: _share(cost, schedule.num_chunks)
        for kind, cost in {"F": forward, "B": backward, "I": backward_input, "W": backward_weight}.items()
    }

    def duration(op: Op) -> Cost:
        return cost_of[op.kind]

    def delay(source: Op, op: Op) -> Cost:
        return comm if schedule.placement[source.stage] != schedule.placement[op.stage] else 0

    if sync == "none":
        starts = earliest_starts(schedule.rows, schedule.needs, duration=duration, delay=delay)
    else:
        everyone = [range(schedule.num_ranks)] * schedule.num_ranks
        starts = _tick_starts(schedule, _partners(schedule) if sync == "neighbour" else everyone, duration, delay)
    ends = {op: start + duration(op) for op, start in starts.items()}
    makespan = max(ends.values())
    work = schedule.num_micro_batches * (forward if schedule.forward_only else forward + backward)
    return Timeline(
        schedule=schedule,
        sync=sync,
        starts=starts,
        ends=ends,
        makespan=makespan,
        bubble=makespan - work,
        peak_live=tuple(_peak_live(schedule, rank) for rank in range(schedule.num_ranks)),
    )


def _cost(name: str, value: object) -> Cost:
    """A cost as an int or a Fraction if it is one, and otherwise as a float."""
    number = value if isinstance(value, Fraction) else as_number(value)
    # The limits leave room for sums, and for the floats with which the times are shown.
    if number is None or number < 0 or (number and not 0.9e-100 < number < 1.1e100):
        raise ScheduleError(
            f"{name}={show(value)}: a cost must be a finite number of at least 0 "
            "(and, if it is not 0, from 1e-100 to 1e100)."
        )
    return number


def _share(cost: Cost, num_chunks: int) -> Cost:
    if num_chunks == 1 or isinstance(cost, float):
        return cost / num_chunks if num_chunks > 1 else cost
    return Fraction(cost, num_chunks)


def _partners(schedule: Schedule) -> list[set[int]]:
    """For each rank, the ranks that it exchanges values with in either direction, and itself."""
    partners = [{rank} for rank in range(schedule.num_ranks)]
    for rank, following in zip(schedule.placement, schedule.placement[1:], strict=False):
        partners[rank].add(following)
        partners[following].add(rank)
    return partners


def _tick_starts(
    schedule: Schedule,
    waits_for: Sequence[Sequence[int] | set[int]],
    duration: Callable[[Op], Cost],
    delay: Callable[[Op, Op], Cost],
) -> dict[Op, Cost]:
    starts: dict[Op, Cost] = {}
    previous: list[Cost] = [0] * schedule.num_ranks  # when each rank finished the previous tick
    for column in zip(*schedule.ticks, strict=True):
        finished: list[Cost] = []
        for rank, op in enumerate(column):
            start = max(previous[other] for other in waits_for[rank])
            if op is None:
                finished.append(start)
                continue
            arrivals = [starts[source] + duration(source) + delay(source, op) for source in schedule.needs(op)]
            starts[op] = max([start, *arrivals])
            finished.append(starts[op] + duration(op))
        previous = finished
    return starts


def _peak_live(schedule: Schedule, rank: int) -> int | Fraction:
    share = Fraction(1, schedule.num_chunks) if schedule.num_chunks > 1 else 1
    if schedule.forward_only:
        return share
    live = peak = 0
    for op in schedule.rows[rank]:
        if op is not None:
            live += {"F": 1, "B": -1, "I": 0, "W": -1}[op.kind]
            peak = max(peak, live)
    return peak * share
