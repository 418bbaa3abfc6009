"""The tables of schedules as arrays of integers, tick by tick, and what they keep at once. Each is made once."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from jaxpipe.errors import ScheduleError
from jaxpipe.lowering.lower import lower
from jaxpipe.schedules.registry import CHUNKED, OWN_CHUNKS, TRAINING
from jaxpipe.schedules.table import Schedule
from jaxpipe.training.config import Config

KINDS = ("", "F", "B", "I", "W")
_CHUNKS = (2, 3, 4, 6, 8)
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


class Tick(NamedTuple):
    """One column of a table.

    Attributes:
      kinds, stages: [ranks], of each op; the kind 0 is idle.
      reads: index of `arrived` of what each op reads, [2, ranks]: (output or gradient, stage and micro-batch).
      source, lands: the ranks that make a value that another op reads, and where it arrives.
      hops: [values], the lower one of the two stages that it goes between.
      joins: [2, permutes], the two ranks of each permute.
    """

    kinds: np.ndarray
    stages: np.ndarray
    reads: tuple[np.ndarray, np.ndarray]
    source: np.ndarray
    lands: tuple[np.ndarray, np.ndarray]
    hops: np.ndarray
    joins: np.ndarray


@dataclass(frozen=True)
class Table:
    """A schedule.

    Attributes:
      placement: the rank of each stage.
      live: [ranks], how many slots hold what F has kept for B or I, at most: one for a micro-batch and a stage.
      pending: [ranks], how many hold what I has kept for W.
      split: whether any backward comes as I and W.
    """

    ranks: int
    micro_batches: int
    placement: tuple[int, ...]
    ticks: tuple[Tick, ...]
    live: np.ndarray
    pending: np.ndarray
    split: bool

    @property
    def num_stages(self) -> int:
        """Over all ranks."""
        return len(self.placement)


@functools.lru_cache(maxsize=512)
def table(name: str, ranks: int, chunks: int, micro_batches: int) -> Table:
    """The table of a schedule of `ranks` ranks with `chunks` stages each.

    Raises:
      ScheduleError: there is no such table, because the schedule wants other numbers of micro-batches, for one.
    """
    return as_table(make(name, ranks, chunks, micro_batches))


def make(name: str, ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """The schedule itself."""
    more = {"num_chunks": chunks} if name in CHUNKED else {}
    return TRAINING[name](ranks * chunks, micro_batches, **more)


@functools.cache
def schedules() -> Mapping[str, tuple[int, ...]]:
    """The schedules that a step can run, with the numbers of stages per rank that are tried for each."""
    tried = {name: _CHUNKS if name in CHUNKED else (OWN_CHUNKS.get(name, 1),) for name in TRAINING}
    return {name: chunks for name, chunks in tried.items() if _runs(name, chunks[0])}


def _runs(name: str, chunks: int) -> bool:
    if name in CHUNKED and not any(field.name == "num_chunks" for field in fields(Config)):
        return False
    try:
        lower(make(name, 2, chunks, 4))
    except ScheduleError:
        return False
    return True


# Rounds of as many micro-batches as there are ranks, after which a longer table only repeats itself.
_KEEP_ALL = ("gpipe", "looped_bfs")
# Tables of many ranks take seconds to make, and their first rounds are long.
_ROUNDS, _ROUNDS_OF_MANY, _MANY = 3, 2, 32


def short(ranks: int, micro_batches: int) -> tuple[int, int]:
    """How many micro-batches of a table have to be looked at, and how many rounds of `ranks` micro-batches are left."""
    longest = (_ROUNDS if ranks <= _MANY else _ROUNDS_OF_MANY) * ranks + micro_batches % ranks
    return (micro_batches, 0) if micro_batches <= longest else (longest, (micro_batches - longest) // ranks)


def kept(name: str, ranks: int, chunks: int, micro_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """[ranks] twice: how many slots each rank has for what forwards keep, and for what waits between I and W."""
    count, rounds = short(ranks, micro_batches)
    long = table(name, ranks, chunks, count)
    more = rounds * ranks * chunks if name in _KEEP_ALL else 0  # the others have come to what they hold
    return long.live + more, long.pending


# Of how many micro-batches each rank keeps something, [ranks], for schedules of one stage per rank; at most M.
HOLDS: Mapping[str, Callable[[int], np.ndarray]] = {
    "1f1b": lambda ranks: ranks - np.arange(ranks),
    "eager_1f1b": lambda ranks: 2 * (ranks - 1 - np.arange(ranks)) + 1,
}


def kept_at_least(name: str, ranks: int, chunks: int, micro_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as `kept` without the table: never more than that, and mostly as much."""
    rank, none = np.arange(ranks), np.zeros(ranks, int)
    ahead = ranks - rank  # as many as 1F1B holds
    if name in _KEEP_ALL:
        return np.full(ranks, chunks * micro_batches), none
    if name == "zero_bubble":
        return np.minimum(ahead, micro_batches), np.minimum(rank + 1, micro_batches)
    if name == "zbv":
        return (none + 2 * ranks, 2 * rank + 1) if micro_batches >= 2 * ranks else (none + 1, none)
    if name == "interleaved":
        return np.minimum((chunks - 1) * ranks + 2 * ahead - 1, chunks * micro_batches), none
    if name == "interleaved_zero_bubble":
        return np.minimum((chunks - 1) * ranks + ahead, chunks * micro_batches), rank + 1
    return np.minimum(HOLDS[name](ranks), micro_batches), none


def inbox(name: str, ranks: int, micro_batches: int) -> int:
    """How many messages, of both kinds together, a rank has room for that have arrived and were not read yet."""
    if name == "looped_bfs":
        return 2 * max(micro_batches - ranks + 1, 1)
    return 2 * max(ranks - 1, 1) if name == "interleaved_zero_bubble" else 3 if name == "zbv" else 2


def is_split(name: str) -> bool:
    """Whether the backward comes as I and W."""
    return "zero_bubble" in name or name == "zbv"


def placement(name: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank of each stage: round and round, or for "zbv" there and back."""
    if name == "zbv":
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(stage % ranks for stage in range(ranks * chunks))


def as_table(schedule: Schedule) -> Table:
    """A schedule as arrays."""
    micro_batches, stages = schedule.num_micro_batches, schedule.num_stages
    where, ranks = schedule.placement, schedule.num_ranks
    live, pending = np.zeros((2, ranks), int), np.zeros((2, ranks), int)  # now, and at most
    ticks: list[Tick] = []
    for column in zip(*schedule.ticks, strict=True):
        kinds, at = np.zeros(ranks, int), np.zeros(ranks, int)
        reads = np.zeros((2, ranks), int)
        made: list[tuple[int, int, int, int]] = []
        joins: set[tuple[int, int]] = set()
        for rank, op in enumerate(column):
            if op is None:
                continue
            kinds[rank], at[rank] = _NUMBER[op.kind], op.stage
            if op.kind != "W":
                reads[:, rank] = int(op.kind != "F"), op.stage * micro_batches + op.micro_batch
            step = {"F": 1, "B": -1, "I": -1}.get(op.kind, 0)
            target = op.stage + step
            if step and 0 <= target < stages:
                made.append((rank, int(step < 0), target * micro_batches + op.micro_batch, min(target, op.stage)))
                if where[target] != rank:
                    joins.add((rank, where[target]))
            _keep(live, rank, {"F": 1, "B": -1, "I": -1}.get(op.kind, 0))
            _keep(pending, rank, {"I": 1, "W": -1}.get(op.kind, 0))
        values = np.array(made, int).reshape(-1, 4)
        pairs = np.array(sorted(joins), int).reshape(-1, 2).T
        source, lands = values[:, 0], (values[:, 1], values[:, 2])
        ticks.append(Tick(kinds, at, (reads[0], reads[1]), source, lands, values[:, 3], pairs))
    return Table(ranks, micro_batches, where, tuple(ticks), live[1], pending[1], schedule.split_backward)


def _keep(counts: np.ndarray, rank: int, by: int) -> None:
    counts[0, rank] += by
    counts[1, rank] = max(counts[1, rank], counts[0, rank])
