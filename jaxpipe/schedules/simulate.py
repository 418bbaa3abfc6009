"""Computes how long a schedule takes and how much it keeps. Every figure about a schedule is derived, and none declared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from jaxpipe.checks import show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.clock import Cost, earliest_starts
from jaxpipe.schedules.costs import OpCosts, PerEdge, PerStage, edge_costs, op_costs, per_stage
from jaxpipe.schedules.held import Holding, curve, peak
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
      bubble: `makespan` minus the work of the rank that has most. That is m(F+B) if all stages cost the same, or m F if the
        table is forward-only.
      memory: what a micro-batch keeps per stage, as `simulate` was given it, or None.
    """

    schedule: Schedule
    sync: Sync
    starts: Mapping[Op, Cost]
    ends: Mapping[Op, Cost]
    makespan: Cost
    bubble: Cost
    memory: Holding | None = None

    @cached_property
    def peak_live(self) -> tuple[int | Fraction, ...]:
        """For each rank, the largest number of micro-batches that it holds at once, in micro-batches of a whole rank.

        With v chunks per rank, one chunk counts 1/v. F begins to hold one, and the end of B or W gives it back. A
        forward-only table keeps nothing after the op, so there it is the 1/v that is being computed.
        """
        return self._peaks(Holding(self._shares))

    @cached_property
    def peak_pending(self) -> tuple[int | Fraction, ...]:
        """For each rank, the largest number of micro-batches between the start of I and the end of W, counted alike."""
        return self._peaks(Holding((0,) * self.schedule.num_stages, self._shares))

    @cached_property
    def peak_bytes(self) -> tuple[Cost, ...] | None:
        """For each rank, the most that micro-batches keep at once, in the unit of `memory`; None if that was not given.

        What waits between I and W is counted. Weights, gradients and what an op needs for itself are not.
        """
        return None if self.memory is None else self._peaks(self.memory)

    @cached_property
    def held(self) -> tuple[list[tuple[Cost, Cost]], ...]:
        """For each rank steps (time, amount): from that time on micro-batches keep so much.

        Amounts are in the unit of `memory`, or if that was not given, in micro-batches of a whole rank.
        """
        holding = Holding(self._shares) if self.memory is None else self.memory
        ranks = range(self.schedule.num_ranks)
        return tuple(
            curve(self.schedule, rank, holding, self.starts.__getitem__, self.ends.__getitem__) for rank in ranks
        )

    @property
    def _shares(self) -> tuple[int | Fraction, ...]:
        share = Fraction(1, self.schedule.num_chunks) if self.schedule.num_chunks > 1 else 1
        return (share,) * self.schedule.num_stages

    def _peaks(self, holding: Holding) -> tuple[Any, ...]:
        return tuple(peak(self.schedule, rank, holding) for rank in range(self.schedule.num_ranks))

    @property
    def bubble_fraction(self) -> float:
        """The bubble as a part of the makespan, 0 to 1."""
        return float(self.bubble / self.makespan) if self.makespan else 0.0


def simulate(
    schedule: Schedule,
    forward: PerStage = 1,
    backward_input: PerStage = 1,
    backward_weight: PerStage = 1,
    comm: PerEdge = 0,
    sync: Sync = "none",
    *,
    memory: Sequence[Cost] | None = None,
    pending: Sequence[Cost] | None = None,
) -> Timeline:
    """Computes when each op of a table starts and ends, and what the ranks keep.

    A cost that is one number is that of one micro-batch on one whole rank, in any unit: with v chunks per rank (on the rank
    that has most), an op costs 1/v of it. A sequence has the cost of one micro-batch for each stage, and none is divided.
    Ints and Fractions are kept exact, and floats stay floats.

    `sync` says what else a rank waits for. The last two values walk through `schedule.ticks`:

    - `"none"`: nothing. An op starts when its rank is free and its inputs have arrived.
    - `"neighbour"`: before each tick, it waits for the previous tick of the ranks that it exchanges values with (ranks
      r - 1 and r + 1, and the wrap-around of a loop placement), also if that tick was idle. A compiled loop waits less: for
      a rank only in ticks in which values go between both, and it may have other ticks than the table has columns.
    - `"global"`: before each tick, it waits for the previous tick of all ranks, so a tick lasts as long as its slowest op.

    Args:
      schedule: the table.
      forward: the cost of F.
      backward_input: the cost of I. B costs `backward_input + backward_weight`.
      backward_weight: the cost of W.
      comm: the time that a value takes from one rank to another, or a mapping of it by (from rank, to rank), both ways. It
        passes beside the computation.
      sync: see above.
      memory: for each stage, the bytes that one micro-batch keeps from the start of F to the end of B or I.
      pending: for each stage, the bytes that one micro-batch keeps from the start of I to the end of W. If only `memory` is
        given, that is kept until then instead; if only this is given, F keeps nothing.

    Raises:
      ScheduleError: a cost is negative or out of range, there is not one for each stage or edge, or `sync` is unknown.
    """
    if not isinstance(schedule, Schedule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ScheduleError(
            f"simulate({show(schedule)}): expected a Schedule, such as schedules.one_f_one_b(4, 8) makes."
        )
    if sync not in SYNCS:
        raise ScheduleError(f"sync={show(sync)} is not known; use one of {', '.join(map(repr, SYNCS))}.")
    duration = op_costs(schedule, forward, backward_input, backward_weight)
    between = edge_costs(schedule, comm)
    holding: Holding | None = None
    if memory is not None or pending is not None:
        kept = (0,) * schedule.num_stages if memory is None else per_stage("memory", memory, schedule)
        holding = Holding(kept, None if pending is None else per_stage("pending", pending, schedule))

    def delay(source: Op, op: Op) -> Cost:
        edge = schedule.placement[source.stage], schedule.placement[op.stage]
        return between[edge] if edge[0] != edge[1] else 0

    if sync == "none":
        starts = earliest_starts(schedule.rows, schedule.needs, duration=duration, delay=delay)
    else:
        everyone = [range(schedule.num_ranks)] * schedule.num_ranks
        starts = _tick_starts(schedule, _partners(schedule) if sync == "neighbour" else everyone, duration, delay)
    ends = {op: start + duration(op) for op, start in starts.items()}
    makespan = max(ends.values())
    return Timeline(
        schedule=schedule,
        sync=sync,
        starts=starts,
        ends=ends,
        makespan=makespan,
        bubble=makespan - _most_work(schedule, duration),
        memory=holding,
    )


def _most_work(schedule: Schedule, duration: OpCosts) -> Cost:
    if duration.per_rank is not None:
        return schedule.num_micro_batches * duration.per_rank
    return max(sum(duration(op) for op in row if op is not None) for row in schedule.rows)


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
