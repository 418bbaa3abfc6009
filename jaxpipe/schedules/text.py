"""Rows of ops as text: the CSV of schedule files, and the grid that `str(schedule)` shows."""

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.op import Op, Row, Rows

_FOREIGN = ("SEND", "RECV", "SHARD", "REDUCE_GRAD", "OVERLAP")


def rows_to_csv(rows: Rows) -> str:
    """One line per rank, cells such as `0F3`, an empty cell for an idle tick."""
    return "".join(",".join("" if op is None else str(op) for op in row) + "\n" for row in rows)


def rows_from_csv(text: str) -> Rows:
    """The inverse of `rows_to_csv`. Rows may have different lengths; spaces and quotes around a cell are ignored.

    The grammar is that of torch.distributed.pipelining's compute-only files. Its files with communication cells are
    refused: here the transfers follow from the ops.
    """
    lines = text.removeprefix("\ufeff").rstrip().splitlines()
    if not lines:
        raise ScheduleError("the CSV is empty; it needs one row per rank, with cells such as 0F3.")
    return tuple(_parse_row(line, rank) for rank, line in enumerate(lines))


def placement_of(rows: Rows) -> tuple[int, ...]:
    """Stage -> rank, read from where the ops are. Raises if a stage is on two ranks, or a stage number is skipped."""
    rank_of: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for column, op in enumerate(row):
            if op is not None and rank_of.setdefault(op.stage, rank) != rank:
                raise ScheduleError(
                    f"row {rank}, column {column}: {op} puts stage {op.stage} on rank {rank}, but row "
                    f"{rank_of[op.stage]} has ops of stage {op.stage} too. A stage lives on one rank: move the cell."
                )
    for stage in range(len(rank_of)):
        if stage not in rank_of:
            raise ScheduleError(
                f"no row has an op of stage {stage}, but there are {len(rank_of)} stages: {sorted(rank_of)}. Stages "
                "count from 0 without a gap."
            )
    return tuple(rank_of[stage] for stage in range(len(rank_of)))


def grid(ticks: Rows, *, show_stage: bool, width: int = 120) -> str:
    """One line per rank, one column per tick; `..` is an idle tick. Tables wider than `width` continue below."""
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


def _parse_row(line: str, rank: int) -> Row:
    return tuple(_parse_cell(cell.strip(' \t"'), rank, column) for column, cell in enumerate(line.split(",")))


def _parse_cell(cell: str, rank: int, column: int) -> Op | None:
    if not cell:
        return None
    try:
        return Op.parse(cell)
    except ScheduleError as error:
        hint = ""
        if any(word in cell for word in _FOREIGN):
            hint = " Communication and overlap cells are not read: export the compute-only table."
        raise ScheduleError(f"row {rank}, column {column}: {error}{hint}") from None
