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
from jaxpipe.schedules.one_f_one_b import one_f_one_b
from jaxpipe.schedules.table import Schedule, is_path

ScheduleLike: TypeAlias = str | Schedule | os.PathLike[str]

TRAINING: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {"1f1b": one_f_one_b, "eager_1f1b": eager_one_f_one_b, "gpipe": gpipe}
)
ALL: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType({**TRAINING, "forward_only": forward_only})


def get(schedule: ScheduleLike, num_stages: int, num_micro_batches: int) -> Schedule:
    """The training schedule that `schedule` means: a name in `TRAINING`, a `Schedule`, or the path of a CSV file.

    Raises:
      ScheduleError: the name is unknown, the file cannot be read or is wrong, the table is for other counts, or it has no
        backward ops.
    """
    table = find(schedule, num_stages, num_micro_batches, known=TRAINING)
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
    *,
    known: Mapping[str, Callable[[int, int], Schedule]] = ALL,
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
        return known[schedule](num_stages, num_micro_batches)
    table = schedule if isinstance(schedule, Schedule) else Schedule.from_csv(schedule)
    if (table.num_stages, table.num_micro_batches) != (num_stages, num_micro_batches):
        raise ScheduleError(
            f"{_describe(schedule)} is a table of {table.num_stages} stages and {table.num_micro_batches} "
            f"micro-batches, but {num_stages} stages and {num_micro_batches} micro-batches are asked for. Make the "
            "table for these counts, or change the counts."
        )
    return table


def _describe(schedule: ScheduleLike) -> str:
    return repr(schedule) if isinstance(schedule, Schedule) else repr(os.fspath(schedule))


def _names(known: Mapping[str, object]) -> str:
    return ", ".join(map(repr, known))
