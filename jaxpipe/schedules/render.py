"""A timeline as text for the terminal."""

import math
from collections.abc import Mapping
from itertools import groupby
from types import MappingProxyType

from jaxpipe.schedules.captions import label, title
from jaxpipe.schedules.simulate import Timeline

_FILLER: Mapping[str, str] = MappingProxyType({"F": " ", "B": "=", "I": "-", "W": "~"})
_ANSI: Mapping[str, str] = MappingProxyType({"F": "44;97", "B": "43;30", "I": "41;97", "W": "42;30"})

MOST_CHARACTERS = 1_000_000  # in a line of `render`, before it is broken into blocks


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
        box = label(op, table).ljust(last - first - 1, _FILLER[op.kind]) + " "
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
    return "\n\n".join([title(timeline, name), *blocks])


def _characters_per_unit(timeline: Timeline) -> float:
    """The smallest scale at which every op has room for its label and a space.

    If the lengths of ops differ so much that the long ones would fill the screen, the labels of the short ones are cut.
    """
    wanted = [
        (len(label(op, timeline.schedule)) + 1) / float(timeline.ends[op] - start)
        for op, start in timeline.starts.items()
        if timeline.ends[op] > start
    ]
    if not wanted:
        return 1.0
    # The last limit is for tables in which waiting is longer than all ops together, by any factor.
    return min(max(wanted), 8 * min(wanted), MOST_CHARACTERS / float(timeline.makespan))


def _paint(cells: list[tuple[str, str]], color: bool) -> str:
    if not color:
        return "".join(character for _, character in cells).rstrip()
    text = ""
    for code, run in groupby(cells, key=lambda cell: _ANSI.get(cell[0], "") if cell[1] != " " else ""):
        characters = "".join(character for _, character in run)
        text += f"\033[{code}m{characters}\033[0m" if code else characters
    return text
