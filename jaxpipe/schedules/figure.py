"""A timeline as a figure: for each rank its ops, and below them what it keeps. Needs matplotlib, the `plot` extra."""

# pyright: reportUnknownMemberType=false
# The annotations of matplotlib leave **kwargs open, so nearly all of its methods count as partially unknown.

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.captions import KINDS, amount, chunk_of, title
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.simulate import Timeline
from jaxpipe.schedules.table import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Color = tuple[float, float, float]

# Blue against warm colours, which differ in lightness: people with any common colour blindness can tell them apart.
_FILL: Mapping[str, str] = MappingProxyType({"F": "#6cb6e0", "B": "#f5a13c", "I": "#ea6f53", "W": "#fbd95f"})
_SHADE = "#808080"  # stands for any of them in the legend of chunks
_EDGE, _IDLE, _MEMORY = "#333333", "#f4f4f4", "#8d86a8"
_PALEST = 0.6  # how far the last chunk of a rank is from its colour to white
_OPS, _GAP, _CURVE = 0.84, 0.08, 0.42  # heights of a rank: its ops, a gap, and what it keeps


def write_figure(timeline: Timeline, path: Path, name: str) -> None:
    """Draws an .svg or .png.

    Raises:
      ScheduleError: matplotlib is missing.
    """
    try:
        # Not pyplot, which would choose a window system and keep the figure alive.
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ScheduleError(
            f"drawing {path.suffix} needs matplotlib, which is not installed. Run `pip install 'jaxpipe[plot]'`, or "
            "write a .json trace instead."
        ) from error

    table = timeline.schedule
    makespan = float(timeline.makespan) or 1.0
    with_memory = not table.forward_only
    pitch = _OPS + 2 * _GAP + (_CURVE + _GAP if with_memory else 0)
    usual = _usual_length(timeline) or makespan
    # Wide enough that an op holds its label, up to a limit beyond which viewers give up.
    inches = min(max(7.0, 0.3 * makespan / usual + 1.4), 60.0)
    per_unit = (inches - 1.4) / makespan
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxpipe", "font.family": "sans-serif"}):
        figure = Figure(figsize=(inches, 0.48 * pitch * table.num_ranks + 1.25), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlim(0, makespan)
        axes.set_ylim(table.num_ranks * pitch - _GAP, -_GAP)
        _draw_ops(axes, timeline, pitch, per_unit)
        axes.set_yticks(
            [rank * pitch + _OPS / 2 for rank in range(table.num_ranks)],
            [f"rank {rank}" for rank in range(table.num_ranks)],
        )
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("time")
        axes.set_facecolor(_IDLE)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_title(title(timeline, name).replace("$", r"\$"), fontsize=10, loc="left")
        handles = [Patch(facecolor=color, edgecolor=_EDGE, linewidth=0.5, label=text) for text, color in _legend(table)]
        handles.append(Patch(facecolor=_IDLE, edgecolor="#bbbbbb", linewidth=0.5, label="idle"))
        if with_memory:
            _draw_memory(axes, timeline, pitch, makespan)
            what = "micro-batches kept" if timeline.memory is None else "memory kept by micro-batches"
            handles.append(Patch(facecolor=_MEMORY, alpha=0.55, label=f"{what} (right: the most)"))
        columns = max(1, min(len(handles), int(inches / 1.75)))
        figure.legend(handles=handles, loc="outside lower right", ncols=columns, frameon=False, fontsize=8)
        # Without a date, because it would make every file different from the one before.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _usual_length(timeline: Timeline) -> float:
    """That of the shortest kind of op. A stage that takes much less than all others shall not stretch the figure."""
    lengths: dict[str, list[float]] = {}
    for op, start in timeline.starts.items():
        lengths.setdefault(op.kind, []).append(float(timeline.ends[op] - start))
    return min((median(of_kind) for of_kind in lengths.values() if any(of_kind)), default=0.0)


def _paler(color: str, chunk: int, num_chunks: int) -> Color:
    """Later chunks of a rank are paler, so that one round through the ranks can be followed by eye."""
    pale = _PALEST * chunk / max(1, num_chunks - 1)
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red + (1 - red) * pale, green + (1 - green) * pale, blue + (1 - blue) * pale


def _legend(table: Schedule) -> list[tuple[str, Color]]:
    kinds = {op.kind for row in table.rows for op in row if op is not None}
    found = [(KINDS[kind], _paler(_FILL[kind], 0, 1)) for kind in KINDS if kind in kinds]
    if table.num_chunks > 1:
        shades = [(f"chunk {chunk}", _paler(_SHADE, chunk, table.num_chunks)) for chunk in range(table.num_chunks)]
        found = [*found, *shades]
    return found


def _draw_ops(axes: "Axes", timeline: Timeline, pitch: float, per_unit: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    table = timeline.schedule
    usual = _usual_length(timeline)
    characters = len(str(table.num_micro_batches - 1))

    def fitting(length: float) -> float:
        return 72 * 0.8 * per_unit * length / (0.62 * characters)

    fontsize = min(9.5, max(4.0, fitting(usual)))
    gap = min(0.06 * usual, 0.02 / per_unit)

    def draw(op: Op, start: float, length: float) -> None:
        top = table.placement[op.stage] * pitch
        inner = max(length - 2 * gap, 0.4 * length)
        axes.add_patch(
            FancyBboxPatch(
                (start + (length - inner) / 2, top),
                inner,
                _OPS,
                boxstyle=f"round,pad=0,rounding_size={min(0.08, inner / 2)}",
                mutation_aspect=1.0,
                facecolor=_paler(_FILL[op.kind], chunk_of(op, table), table.num_chunks),
                edgecolor=_EDGE,
                linewidth=0.5,
            )
        )
        if fitting(length) >= fontsize * 0.9:  # a label that is wider than its op would hide the next one
            middle, height = start + length / 2, top + _OPS / 2
            text = str(op.micro_batch)
            axes.text(middle, height, text, ha="center", va="center", fontsize=fontsize, color="#111111")

    for op, start in timeline.starts.items():
        draw(op, float(start), float(timeline.ends[op] - start))


def _draw_memory(axes: "Axes", timeline: Timeline, pitch: float, makespan: float) -> None:
    """Below the ops of each rank the curve of what it keeps, all to one scale, with the largest value at the right."""
    held = timeline.held
    most = max(float(value) for steps in held for _, value in steps) or 1.0
    heights: list[float] = []
    texts: list[str] = []
    for rank, steps in enumerate(held):
        base = rank * pitch + _OPS + _GAP + _CURVE
        times = [float(time) for time, _ in steps] + [makespan]
        tops = [base - _CURVE * float(value) / most for _, value in steps]
        axes.fill_between(times, [*tops, tops[-1]], base, step="post", color=_MEMORY, alpha=0.55, linewidth=0)
        peak = max(value for _, value in steps)
        heights.append(base - _CURVE * float(peak) / most)
        texts.append(amount(timeline, peak))
        axes.hlines(heights[-1], 0, makespan, color=_MEMORY, linewidth=0.6, linestyle=(0, (1, 2)))
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(heights, texts, fontsize=8)
    right.tick_params(axis="y", length=2, color=_MEMORY)
    for side in ("top", "right", "left", "bottom"):
        right.spines[side].set_visible(False)
