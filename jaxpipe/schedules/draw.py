"""Pictures of a timeline in files: SVG and PNG, and a trace for ui.perfetto.dev or chrome://tracing."""

import os
from collections.abc import Callable
from pathlib import Path

from jaxpipe.checks import show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.figure import write_figure
from jaxpipe.schedules.simulate import Timeline, simulate
from jaxpipe.schedules.table import Schedule
from jaxpipe.schedules.trace import write_trace


def draw(schedule_or_timeline: Schedule | Timeline, path: str | os.PathLike[str], *, name: str = "") -> None:
    """Draws which rank computes which op when, and what it keeps, and writes the picture to a file.

    Args:
      schedule_or_timeline: a `Schedule` is simulated with the default costs first.
      path: its suffix is the format. .svg and .png need matplotlib, the `plot` extra. .json is the Chrome trace format, in
        which one unit of time becomes one millisecond.
      name: the beginning of the title.

    Raises:
      ScheduleError: the suffix is another one, the file cannot be written, or matplotlib is missing.
    """
    writers: dict[str, Callable[[Timeline, Path, str], None]] = {
        ".svg": write_figure,
        ".png": write_figure,
        ".json": write_trace,
    }
    if not isinstance(schedule_or_timeline, (Schedule, Timeline)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ScheduleError(f"draw({show(schedule_or_timeline)}, ...): expected a Schedule or a Timeline.")
    path = Path(path)
    if path.suffix not in writers:
        raise ScheduleError(f"{str(path)!r} must end in one of {', '.join(writers)}: the suffix is the format.")
    timeline = simulate(schedule_or_timeline) if isinstance(schedule_or_timeline, Schedule) else schedule_or_timeline
    try:
        writers[path.suffix](timeline, path, name)
    except OSError as error:
        raise ScheduleError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    except ValueError as error:  # from matplotlib: more pixels than it can draw, or a zero byte in the path
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(f"cannot write {str(path)!r}: {error} Write a .json trace instead.") from error
