"""Makes a table of what a user passes as `schedule=`: a name, a table, or the path of a CSV file."""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from jaxpipe.checks import did_you_mean, show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.check import check_positive
from jaxpipe.schedules.eager_one_f_one_b import eager_one_f_one_b
from jaxpipe.schedules.forward_only import forward_only
from jaxpipe.schedules.gpipe import gpipe
from jaxpipe.schedules.interleaved import interleaved
from jaxpipe.schedules.interleaved_zero_bubble import interleaved_zero_bubble
from jaxpipe.schedules.looped_bfs import looped_bfs
from jaxpipe.schedules.one_f_one_b import one_f_one_b
from jaxpipe.schedules.table import Schedule, is_path
from jaxpipe.schedules.zbv import zbv
from jaxpipe.schedules.zero_bubble import zero_bubble

ScheduleLike: TypeAlias = str | Schedule | os.PathLike[str]
Factory: TypeAlias = Callable[..., Schedule]  # (num_stages, num_micro_batches), those in CHUNKED also (..., num_chunks)

TRAINING: Mapping[str, Factory] = MappingProxyType(
    {
        "1f1b": one_f_one_b,
        "eager_1f1b": eager_one_f_one_b,
        "gpipe": gpipe,
        "interleaved": interleaved,
        "looped_bfs": looped_bfs,
        "zero_bubble": zero_bubble,
        "interleaved_zero_bubble": interleaved_zero_bubble,
        "zbv": zbv,
    }
)
ALL: Mapping[str, Factory] = MappingProxyType({**TRAINING, "forward_only": forward_only})

# How many stages of a rank the names stand for: as many as one says, a number of their own, or, all others, one.
CHUNKED = ("interleaved", "looped_bfs", "interleaved_zero_bubble", "forward_only")
OWN_CHUNKS: Mapping[str, int] = MappingProxyType({"zbv": 2})


def own_chunks(schedule: ScheduleLike) -> int | None:
    """How many stages `schedule` has on the rank that has most; None for a name that takes any number, or is not known.

    Raises:
      ScheduleError: a file cannot be read.
    """
    if isinstance(schedule, str) and not is_path(
        schedule
    ):  # of names that are not known `find` says what is to be said
        return None if schedule in CHUNKED or schedule not in ALL else OWN_CHUNKS.get(schedule, 1)
    return _read(schedule).num_chunks


def dealt_out() -> str:
    """The names of the training schedules that have as many stages per rank as one says, for messages."""
    return ", ".join(repr(name) for name in CHUNKED if name in TRAINING)


def chunks_of(schedule: ScheduleLike, num_chunks: int = 1) -> int:
    """How many stages `schedule` has on the rank that has most.

    Args:
      num_chunks: how many are asked for. 1 asks for nothing: it is what each schedule has of its own.

    Raises:
      ScheduleError: the schedule has another number, or `num_chunks` is no integer of at least 1, or a file cannot be read.
    """
    (num_chunks,) = check_positive(num_chunks=num_chunks)
    own = own_chunks(schedule)
    if own is None:
        return num_chunks
    if num_chunks not in (1, own):
        raise ScheduleError(
            f"num_chunks={num_chunks} with {_describe(schedule)}, which has {own} {'stages' if own > 1 else 'stage'} per "
            f"rank. Leave num_chunks out, or use one of {dealt_out()}, which have as many as you say."
        )
    return own


def get(schedule: ScheduleLike, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """The training schedule that `schedule` means: a name in `TRAINING`, a `Schedule`, or the path of a CSV file.

    Args:
      num_stages: all stages, `num_chunks` times as many as ranks.
      num_chunks: see `chunks_of`.

    Raises:
      ScheduleError: the name is unknown, the file cannot be read or is wrong, the table is for other counts, or it has no
        backward ops.
    """
    table = find(schedule, num_stages, num_micro_batches, num_chunks, known=TRAINING)
    if table.forward_only:
        raise ScheduleError(
            f"{_describe(schedule)} has no backward ops, so it cannot train; evaluation picks its own forward-only "
            f"table. Use one of {_names(TRAINING)}."
        )
    return table


def find(
    schedule: ScheduleLike,
    num_stages: int,
    num_micro_batches: int,
    num_chunks: int = 1,
    *,
    known: Mapping[str, Factory] = ALL,
) -> Schedule:
    """The same as `get`, except that all names in `known` and tables without backward ops are allowed.

    Raises:
      ScheduleError: the name is unknown, the file cannot be read or is wrong, or the table is for other counts.
    """
    if not isinstance(schedule, (str, Schedule, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ScheduleError(f"schedule={show(schedule)} must be a name ({_names(known)}), a Schedule, or a path.")
    num_stages, num_micro_batches = check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    if isinstance(schedule, str) and not is_path(schedule):
        if schedule not in known:
            guess = did_you_mean(schedule, known, cutoff=0.4)
            raise ScheduleError(
                f"{show(schedule)} is not a schedule.{guess} Use one of {_names(known)}, a Schedule, or the path of a .csv "
                "file."
            )
        num_chunks = chunks_of(schedule, num_chunks)
        if schedule in CHUNKED:
            return known[schedule](num_stages, num_micro_batches, num_chunks)
        return known[schedule](num_stages, num_micro_batches)
    table = _read(schedule)
    chunks_of(table, num_chunks)
    if (table.num_stages, table.num_micro_batches) != (num_stages, num_micro_batches):
        raise ScheduleError(
            f"{_describe(schedule)} is a table of {table.num_stages} stages and {table.num_micro_batches} "
            f"micro-batches, but {num_stages} stages and {num_micro_batches} micro-batches are asked for. Make the "
            "table for these counts, or change the counts."
        )
    return table


def _read(schedule: Schedule | str | os.PathLike[str]) -> Schedule:
    return schedule if isinstance(schedule, Schedule) else Schedule.from_csv(schedule)


def _describe(schedule: ScheduleLike) -> str:
    return repr(schedule) if isinstance(schedule, Schedule) else repr(os.fspath(schedule))


def _names(known: Mapping[str, object]) -> str:
    return ", ".join(map(repr, known))
