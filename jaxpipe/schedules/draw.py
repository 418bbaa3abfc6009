"""Pictures of a timeline: text for the terminal, SVG and PNG, and a trace for chrome://tracing or ui.perfetto.dev."""

# pyright: reportUnknownMemberType=false
# The annotations of matplotlib leave **kwargs open, so nearly all of its methods count as partially unknown.

import json
import math
import os
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from jaxpipe.checks import show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.simulate import Timeline, simulate
from jaxpipe.schedules.table import Schedule

_NAMES: Mapping[str, str] = MappingProxyType(
    {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
)
# Blue against warm colours, which differ in lightness: people with any common colour blindness can tell them apart.
_FILL: Mapping[str, str] = MappingProxyType({"F": "#8ecae6", "B": "#ffb703", "I": "#f4845f", "W": "#ffe8a3"})
_FILLER: Mapping[str, str] = MappingProxyType({"F": " ", "B": "=", "I": "-", "W": "~"})
_ANSI: Mapping[str, str] = MappingProxyType({"F": "44;97", "B": "43;30", "I": "41;97", "W": "42;30"})

MOST_CHARACTERS = 1_000_000  # in a line of `render`, before it is broken into blocks


def draw(schedule_or_timeline: Schedule | Timeline, path: str | os.PathLike[str], *, name: str = "") -> None:
    """Draws which rank computes which op when, and writes the picture to a file.

    Args:
      schedule_or_timeline: a `Schedule` is simulated with the default costs first.
      path: its suffix is the format. .svg and .png need matplotlib, the `plot` extra. .json is the Chrome trace format, in
        which one unit of time becomes one millisecond.
      name: the beginning of the title.

    Raises:
      ScheduleError: the suffix is another one, the file cannot be written, or matplotlib is missing.
    """
    writers: dict[str, Callable[[Timeline, Path, str], None]] = {".svg": _figure, ".png": _figure, ".json": _trace}
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


def _title(timeline: Timeline, name: str) -> str:
    table = timeline.schedule
    chunks = f" x {table.num_chunks} chunks" if table.num_chunks > 1 else ""
    sync = "" if timeline.sync == "none" else f" ({timeline.sync} sync)"
    return (
        f"{name + ': ' if name else ''}{table.num_ranks} ranks{chunks}, {table.num_micro_batches} micro-batches: "
        f"makespan {float(timeline.makespan):g}{sync}, bubble {float(timeline.bubble):g} = "
        f"{timeline.bubble_fraction:.1%}"
    )


def render(timeline: Timeline, *, name: str = "", width: int = 120, color: bool = False) -> str:
    """Draws a timeline as text, with one line per rank and time to the right, in blocks of at most `width` characters.

    An op begins with its label and is filled up to its end: B with `=`, I with `-`, and W with `~`. Idle time is dots.

    Args:
      name: the beginning of the title.
      color: whether to color the ops with the escape sequences of terminals.
    """
    table = timeline.schedule
    names = [f"rank {rank}" for rank in range(table.num_ranks)]
    margin = max(map(len, names)) + 3
    scale = _characters_per_unit(timeline)
    total = round(float(timeline.makespan) * scale)
    canvas = [[("", ".")] * total for _ in names]  # (kind, character)
    for op, start in timeline.starts.items():
        first, last = round(float(start) * scale), round(float(timeline.ends[op]) * scale)
        box = _label(op, table).ljust(last - first - 1, _FILLER[op.kind]) + " "
        canvas[table.placement[op.stage]][first:last] = [(op.kind, character) for character in box[: last - first]]
    num_blocks = max(1, math.ceil(total / max(1, width - margin)))
    per_block = max(
        1, math.ceil(total / num_blocks)
    )  # equal blocks, because a short rest below a full block reads badly
    blocks = [
        "\n".join(
            f"{rank_name:<{margin - 3}} | {_paint(row[first : first + per_block], color)}"
            for rank_name, row in zip(names, canvas, strict=True)
        )
        for first in range(0, total, per_block)
    ]
    return "\n\n".join([_title(timeline, name), *blocks])


def _characters_per_unit(timeline: Timeline) -> float:
    """The smallest scale at which every op has room for its label and a space.

    If the lengths of ops differ so much that the long ones would fill the screen, the labels of the short ones are cut.
    """
    wanted = [
        (len(_label(op, timeline.schedule)) + 1) / float(timeline.ends[op] - start)
        for op, start in timeline.starts.items()
        if timeline.ends[op] > start
    ]
    if not wanted:
        return 1.0
    # The last limit is for tables in which waiting is longer than all ops together, by any factor.
    return min(max(wanted), 8 * min(wanted), MOST_CHARACTERS / float(timeline.makespan))


def _label(op: Op, table: Schedule) -> str:
    return str(op) if table.num_chunks > 1 else f"{op.kind}{op.micro_batch}"


def _paint(cells: list[tuple[str, str]], color: bool) -> str:
    if not color:
        return "".join(character for _, character in cells).rstrip()
    text = ""
    for code, run in groupby(cells, key=lambda cell: _ANSI.get(cell[0], "") if cell[1] != " " else ""):
        characters = "".join(character for _, character in run)
        text += f"\033[{code}m{characters}\033[0m" if code else characters
    return text


def _trace(timeline: Timeline, path: Path, name: str) -> None:
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(timeline.schedule.num_ranks)
    ]
    for op, start in sorted(timeline.starts.items(), key=lambda item: (item[1], item[0])):
        events.append(
            {
                "ph": "X",
                "name": str(op),
                "cat": _NAMES[op.kind],
                "pid": 0,
                "tid": timeline.schedule.placement[op.stage],
                "ts": float(start * 1000),  # the format counts microseconds
                "dur": float((timeline.ends[op] - start) * 1000),
                "args": {"stage": op.stage, "micro_batch": op.micro_batch},
            }
        )
    path.write_text(
        json.dumps({"traceEvents": events, "otherData": {"title": _title(timeline, name)}}), encoding="utf-8"
    )


def _figure(timeline: Timeline, path: Path, name: str) -> None:
    try:
        # Not pyplot, which would choose a window system and keep the figure alive.
        import matplotlib
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, Patch
    except ImportError as error:
        raise ScheduleError(
            f"drawing {path.suffix} needs matplotlib, which is not installed. Run `pip install 'jaxpipe[plot]'`, or "
            "write a .json trace instead."
        ) from error

    table = timeline.schedule
    makespan = float(timeline.makespan) or 1.0
    lengths = [float(timeline.ends[op] - start) for op, start in timeline.starts.items()]
    shortest = min((length for length in lengths if length > 0), default=makespan)
    # Wide enough that the shortest op holds its label, up to a limit beyond which viewers give up.
    inches = min(max(7.0, 0.3 * makespan / shortest + 0.8), 60.0)
    height = 0.42 * table.num_ranks + 1.25
    per_unit = (inches - 0.8) / makespan
    characters = len(str(table.num_micro_batches - 1))
    fontsize = min(9.5, max(1.0, 72 * 0.8 * per_unit * shortest / (0.62 * characters)))

    def chunk_of(op: Op) -> int:
        return table.placement[: op.stage].count(table.placement[op.stage])

    def fill(op: Op) -> tuple[float, float, float]:
        # Later chunks of a rank are paler, so that one round through the ranks can be followed by eye.
        red, green, blue = to_rgb(_FILL[op.kind])
        pale = 0.7 * chunk_of(op) / table.num_chunks
        return red + (1 - red) * pale, green + (1 - green) * pale, blue + (1 - blue) * pale

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxpipe", "font.family": "sans-serif"}):
        figure = Figure(figsize=(inches, height), layout="constrained")
        axes = figure.add_subplot()
        gap = min(0.06 * shortest, 0.02 / per_unit)
        for op, start in timeline.starts.items():
            length = float(timeline.ends[op] - start)
            rank = table.placement[op.stage]
            axes.add_patch(
                FancyBboxPatch(
                    (float(start) + gap, rank - 0.42),
                    max(length - 2 * gap, 0.0),
                    0.84,
                    boxstyle="round,pad=0,rounding_size=0.08",
                    mutation_aspect=1.0,
                    facecolor=fill(op),
                    edgecolor="#333333",
                    linewidth=0.5,
                )
            )
            axes.text(
                float(start) + length / 2,
                rank,
                str(op.micro_batch),
                ha="center",
                va="center",
                fontsize=fontsize,
                color="#111111",
            )
        axes.set_xlim(0, makespan)
        axes.set_ylim(table.num_ranks - 0.5, -0.5)
        axes.set_yticks(range(table.num_ranks), [f"rank {rank}" for rank in range(table.num_ranks)])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("time")
        axes.set_facecolor("#f4f4f4")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_title(_title(timeline, name).replace("$", r"\$"), fontsize=10, loc="left")
        meanings = {(op.kind, chunk_of(op)): fill(op) for op in timeline.starts}
        handles = [
            Patch(
                facecolor=color,
                edgecolor="#333333",
                linewidth=0.5,
                label=_NAMES[kind] + (f", chunk {chunk}" if table.num_chunks > 1 else ""),
            )
            for (kind, chunk), color in sorted(
                meanings.items(), key=lambda item: ("FBIW".index(item[0][0]), item[0][1])
            )
        ]
        handles.append(Patch(facecolor="#f4f4f4", edgecolor="#bbbbbb", linewidth=0.5, label="idle"))
        figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=8)
        # Without a date, because it would make every file different from the one before.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
