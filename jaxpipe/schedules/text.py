"""Rows of ops as text: the CSV of schedule files, and the grid of `str(schedule)`."""

import re

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.op import Op, Rows

# Cells that torch.distributed.pipelining writes besides the ops: what a stage sends and receives, when its weights are
# gathered, and when gradients are summed over the data ranks. Here all that follows from the ops.
_BY_ITSELF = re.compile(r"\d{1,9}((UNSHARD|RESHARD|REDUCE_GRAD)\d{0,9}|(SEND|RECV)_[FB]\d{1,9})", re.ASCII)
_OVERLAP = re.compile(r"\(([^()]*)\)\s*OVERLAP_F_B", re.ASCII)
_ORDER = "FBIW"  # of the ops in an overlapped pair; I comes before W because W needs it


def rows_to_csv(rows: Rows) -> str:
    """Writes one line per rank, with cells such as `0F3`, and an empty cell for an idle tick."""
    return "".join(",".join("" if op is None else str(op) for op in row) + "\n" for row in rows)


def rows_from_csv(text: str) -> Rows:
    """Reads what `rows_to_csv` writes. Rows may have different lengths; spaces and quotes around a cell are ignored.

    It also reads the files of torch.distributed.pipelining, with or without communication. Cells for communication are left
    out, because it follows from the ops here. An overlapped pair such as `(0F3;3B1)OVERLAP_F_B` becomes its forward,
    followed by its backward.

    Raises:
      ScheduleError: a cell is none of these, occurs twice, or puts a stage on a second rank. The message has the row and
        the column in the file.
    """
    lines = text.removeprefix("\ufeff").rstrip().splitlines()
    if not lines:
        raise ScheduleError("the CSV is empty; it needs one row per rank, with cells such as 0F3.")
    rows: list[tuple[Op | None, ...]] = []
    place_of: dict[Op, str] = {}
    rank_of: dict[int, int] = {}
    for rank, line in enumerate(lines):
        row: list[Op | None] = []
        for column, cell in enumerate(line.split(",")):
            where = f"row {rank}, column {column}"
            ops = _parse_cell(cell.strip(' \t"'), where)
            row += ops
            for op in filter(None, ops):
                if op in place_of:
                    raise ScheduleError(
                        f"{where}: {op} occurs twice, here and in {place_of[op]}; every op must occur once. Remove one of "
                        "them."
                    )
                place_of[op] = where
                _check_rank(op, rank, where, rank_of)
        rows.append(tuple(row))
    _check_numbering(place_of)
    return tuple(rows)


def _check_numbering(place_of: dict[Op, str]) -> None:
    """Refuses forwards that are numbered from 1, a common fault: torch's Schedule1F1B writes those of the last rank so."""
    forwards: dict[int, list[int]] = {}
    for op in place_of:
        if op.kind == "F":
            forwards.setdefault(op.stage, []).append(op.micro_batch)
    for stage, found in forwards.items():
        if sorted(found) == list(range(1, len(found) + 1)) and any(0 in others for others in forwards.values()):
            odd = Op("F", stage, len(found))
            raise ScheduleError(
                f"{place_of[odd]}: {odd} is one too many: the forwards of stage {stage} are numbered 1 to {len(found)}, "
                f"but micro-batches count from 0. Write {stage}F0 to {stage}F{len(found) - 1}."
            )


def _check_rank(op: Op, rank: int, where: str, rank_of: dict[int, int]) -> None:
    if rank_of.setdefault(op.stage, rank) != rank:
        raise ScheduleError(
            f"{where}: {op} puts stage {op.stage} on rank {rank}, but row {rank_of[op.stage]} has ops of stage {op.stage} "
            "too. A stage lives on one rank: move the cell."
        )


def placement_of(rows: Rows) -> tuple[int, ...]:
    """The rank of each stage, which follows from where its ops are.

    Raises:
      ScheduleError: a stage is on two ranks, or the number of a stage is skipped.
    """
    rank_of: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for column, op in enumerate(row):
            if op is not None:
                _check_rank(op, rank, f"row {rank}, column {column}", rank_of)
    for stage in range(len(rank_of)):
        if stage not in rank_of:
            raise ScheduleError(
                f"no row has an op of stage {stage}, but there are {len(rank_of)} stages: {_some(sorted(rank_of))}. Stages "
                "count from 0 without a gap."
            )
    return tuple(rank_of[stage] for stage in range(len(rank_of)))


def grid(ticks: Rows, *, show_stage: bool, width: int = 120) -> str:
    """Draws one line per rank and one column per tick; `..` is an idle tick. Tables wider than `width` continue below."""
    cells = [[_short(op, show_stage) for op in row] for row in ticks]
    size = max(len(cell) for row in cells for cell in row)
    names = [f"rank {rank}" for rank in range(len(ticks))]
    margin = max(map(len, names))
    per_block = max(1, (width - margin - 2) // (size + 1))
    blocks: list[str] = []
    for first in range(0, len(cells[0]), per_block):
        lines = [
            f"{name:<{margin}} | {' '.join(f'{cell:<{size}}' for cell in row[first : first + per_block])}".rstrip()
            for name, row in zip(names, cells, strict=True)
        ]
        if len(cells[0]) > per_block:
            lines.insert(0, f"ticks {first}..{min(first + per_block, len(cells[0])) - 1}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _short(op: Op | None, show_stage: bool) -> str:
    if op is None:
        return ".."
    return str(op) if show_stage else f"{op.kind}{op.micro_batch}"


def _some(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 20 else f"{str(numbers[:20])[:-1]}, ...]"


def _parse_cell(cell: str, where: str) -> list[Op | None]:
    """The ops of a cell: one op, those of an overlapped pair, `[None]` for an idle cell, or `[]` if it is left out."""
    if not cell:
        return [None]
    if _BY_ITSELF.fullmatch(cell):
        return []
    try:
        if "OVERLAP" in cell or cell.startswith("("):
            return _parse_pair(cell)
        return [Op.parse(cell)]
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}") from None


def _parse_pair(cell: str) -> list[Op | None]:
    match = _OVERLAP.fullmatch(cell)
    if match is None:
        raise ScheduleError(f"{cell[:80]!r} is not an overlapped pair; write (0F3;3B1)OVERLAP_F_B.")
    ops = sorted((Op.parse(part.strip()) for part in match[1].split(";")), key=lambda op: _ORDER.index(op.kind))
    kinds = "".join(op.kind for op in ops)
    if kinds not in ("FB", "FI", "FW", "FIW"):
        raise ScheduleError(
            f"{cell[:80]!r} overlaps {' and '.join(map(str, ops))}; a pair is one forward and one backward, the latter as "
            "B, I, W, or I and W."
        )
    return [*ops]
