"""How long a table takes when each stage has costs of its own: a walk through its ticks, all ranks of a tick at once.

It is what `schedules.simulate` computes, for the one purpose of being fast enough for a search, and with a rule for waiting
that is that of the compiled loop: a permute joins two ranks in the ticks in which it carries a value. Long tables are not
walked to their end: behind its warm-up a table repeats itself, so two short ones tell how long each further round takes.
"""

from typing import NamedTuple

import numpy as np

from jaxpipe.planner.tables import HOLDS, KINDS, Table, is_split, placement, short, table


class OpCosts(NamedTuple):
    """Seconds of each op of each stage, [stages] each; B takes as long as I and W together."""

    forward: np.ndarray
    input: np.ndarray
    weight: np.ndarray


class Walk(NamedTuple):
    """What came out.

    Attributes:
      makespan: seconds from the start of the first op to the end of the last one.
      busy: [ranks], seconds of the ops of each rank.
    """

    makespan: float
    busy: np.ndarray

    @property
    def bubble(self) -> float:
        """The part of the time in which ranks wait, on average over the ranks, 0 to 1."""
        return max(float(1 - self.busy.mean() / self.makespan), 0.0) if self.makespan else 0.0


def walk(
    name: str,
    ranks: int,
    chunks: int,
    micro_batches: int,
    costs: OpCosts,
    comm: float | np.ndarray = 0.0,
    joined: bool = True,
) -> Walk:
    """How long a schedule takes.

    Args:
      name, ranks, chunks, micro_batches: the schedule.
      comm: seconds of a value from rank to rank, or [stages - 1], from each stage to the next one and back. They pass
        beside the computation.
      joined: whether both ranks of a permute wait for each other; without, a rank waits for its inputs only.
    """
    count, rounds = short(ranks, micro_batches)
    made = table(name, ranks, chunks, count)
    found, busy = _makespan(made, costs, comm, joined), _busy(made, costs)
    if rounds:
        # Ranks that wait at the beginning only may hide for some rounds what the busiest one needs in all of them.
        least = float(busy.max()) * ranks / count
        round_of = found - _makespan(table(name, ranks, chunks, count - ranks), costs, comm, joined)
        found += rounds * max(round_of, least)
    return Walk(found, busy * (micro_batches / count))


def _busy(made: Table, costs: OpCosts) -> np.ndarray:
    per_stage = (costs.forward + costs.input + costs.weight) * made.micro_batches
    return np.bincount(made.placement, per_stage, made.ranks)


def _makespan(made: Table, costs: OpCosts, comm: float | np.ndarray, joined: bool) -> float:
    """Walks through the ticks."""
    of_kind = {"": 0 * costs.forward, "F": costs.forward, "I": costs.input, "W": costs.weight}
    cost = np.stack([of_kind.get(kind, costs.input + costs.weight) for kind in KINDS])
    arrived = np.zeros((2, made.num_stages * made.micro_batches))  # of outputs, and of gradients
    ready, where = np.zeros(made.ranks), np.asarray(made.placement)
    hops = np.broadcast_to(comm, made.num_stages - 1) * (where[1:] != where[:-1])
    for tick in made.ticks:
        # An idle cell and a W take nothing: their slot of `arrived` stays 0.
        start = np.maximum(ready, arrived[tick.reads])
        end = start + cost[tick.kinds, tick.stages]
        if len(tick.source):
            arrived[tick.lands] = end[tick.source] + hops[tick.hops]
        ready = end
        if joined and len(tick.joins):
            ready = end.copy()
            np.maximum.at(ready, tick.joins[1], end[tick.joins[0]])
            np.maximum.at(ready, tick.joins[0], end[tick.joins[1]])
    return float(ready.max())


def lower_bound(
    name: str, ranks: int, chunks: int, micro_batches: int, costs: OpCosts, comm: float | np.ndarray = 0.0
) -> float:
    """Seconds that the walk of a schedule cannot stay below.

    A rank cannot begin before a micro-batch has come through the stages before its first one; it has its own work; and
    where the backward is whole, the gradient still has to go through those stages at the end. Where a rank waits for the
    gradient of a micro-batch before it takes up another one, as many as it may hold come round in the time of one way
    there and back.
    """
    where, back = placement(name, ranks, chunks), costs.input + costs.weight
    first = np.array([where.index(rank) for rank in range(ranks)])
    hops = np.broadcast_to(comm, len(where) - 1) * (np.diff(where) != 0)
    before, behind = (np.concatenate([[0.0], np.cumsum(cost[:-1] + hops)])[first] for cost in (costs.forward, back))
    work = np.bincount(where, costs.forward + back, ranks) * micro_batches
    if name in HOLDS:
        holds = np.minimum(HOLDS[name](ranks), micro_batches)
        there = np.cumsum((costs.forward + back + np.append(2 * hops, 0.0))[::-1])[::-1]
        work = np.maximum(work, there * ((micro_batches - 1) // holds + 1))
    return float((before + work + (0 if is_split(name) else behind)).max())
