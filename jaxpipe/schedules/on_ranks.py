"""A training schedule for so many ranks: how many stages that makes, with one or several chunks per rank."""

import os

from jaxpipe.checks import count, show
from jaxpipe.errors import ConfigError, ScheduleError
from jaxpipe.schedules.registry import ScheduleLike, chunks_of, dealt_out, get, own_chunks
from jaxpipe.schedules.table import Schedule, is_path


def check_num_chunks(schedule: ScheduleLike, num_chunks: object) -> int:
    """`num_chunks` as an int; 1 means: as the schedule has it. Files are not read, and names need not be known.

    Raises:
      ConfigError: it is no integer of at least 1, or the schedule has another number of chunks.
    """
    found = count("num_chunks", num_chunks)
    if found == 1:
        return found
    is_table = isinstance(schedule, Schedule)
    if not is_table and (not isinstance(schedule, str) or is_path(schedule)):
        return found
    own = own_chunks(schedule)
    if own in (None, found):
        return found
    if is_table:
        raise ConfigError(
            f"num_chunks={found} with {schedule!r}: a table brings its own number of chunks, {own}. Leave num_chunks out."
        )
    raise ConfigError(
        f"num_chunks={found} with schedule={show(schedule)}, which has {own} stage{'s' if own != 1 else ''} per rank. "
        f"Leave num_chunks out, or take one of {dealt_out()}, which have as many as you say."
    )


def get_on_ranks(schedule: ScheduleLike, num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """The training schedule that `schedule` means on so many ranks.

    Args:
      num_chunks: stages per rank; 1 means: as the schedule has it, and 1 for those that take any number.

    Raises:
      ConfigError: the number of chunks does not fit the schedule. ScheduleError: as `get`, or the table is for another
        number of ranks.
    """
    num_chunks = check_num_chunks(schedule, num_chunks)
    if isinstance(schedule, str) and not is_path(schedule):
        return get(schedule, num_ranks * chunks_of(schedule, num_chunks), num_micro_batches, num_chunks)
    if not isinstance(schedule, (str, Schedule, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        return get(schedule, num_ranks, num_micro_batches)  # says what it may be
    table = schedule if isinstance(schedule, Schedule) else Schedule.from_csv(schedule)
    check_num_chunks(table, num_chunks)
    if table.num_ranks != num_ranks:
        raise ScheduleError(
            f"{schedule!r} is a table of {table.num_ranks} ranks and {table.num_stages} stages, but the mesh has "
            f"{num_ranks} ranks. Make the table for these, or change the size of the axis 'pipe'."
        )
    return get(table, table.num_stages, num_micro_batches)
