"""Checks that rows of ops are a schedule. Every check raises `ScheduleError`, and says how to repair the table."""

from collections.abc import Iterable, Mapping

from jaxpipe.checks import as_count, as_integer, show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.clock import earliest_starts
from jaxpipe.schedules.op import Op, Rows, needs

MOST = 1_000_000  # stages, or micro-batches; no machine holds a larger table


def check_positive(**counts: object) -> tuple[int, ...]:
    """Returns counts as ints, as in `check_positive(num_stages=4)`.

    Raises:
      ScheduleError: a count is no integer of at least 1, or larger than `MOST`.
    """
    found: list[int] = []
    for name, value in counts.items():
        number = as_count(value)
        if number is None:
            raise ScheduleError(f"{name}={show(value)}: it must be an integer of at least 1.")
        if number > MOST:
            raise ScheduleError(f"{name}={show(value)}: a table with so many ops does not fit in memory.")
        found.append(number)
    return tuple(found)


def check_rows(rows: Rows, placement: tuple[int, ...]) -> None:
    """Checks that `rows` is a complete table that runs to its end. The cheap checks come first, the deadlock check last.

    Raises:
      ScheduleError: an op is missing, occurs twice or is on the wrong rank, or the ranks would wait for each other.
    """
    _check_placement(rows, placement)
    cells = _check_cells(rows, placement)
    _check_complete(cells, len(placement))
    _check_deadlock(rows, len(placement), split_pairs(cells))


def split_pairs(ops: Iterable[Op]) -> frozenset[tuple[int, int]]:
    """The (stage, micro_batch) pairs whose backward is split into I and W."""
    return frozenset((op.stage, op.micro_batch) for op in ops if op.kind == "I")


def _check_placement(rows: Rows, placement: tuple[int, ...]) -> None:
    if not rows or not placement:
        raise ScheduleError(
            f"a schedule with {len(rows)} rows and {len(placement)} stages is empty; give one row per rank and, in "
            "`placement`, the rank of every stage."
        )
    for stage, rank in enumerate(placement):
        if as_integer(rank) not in range(len(rows)):
            raise ScheduleError(
                f"placement puts stage {stage} on rank {show(rank)}, but the table has {len(rows)} rows; ranks are "
                f"0..{len(rows) - 1}."
            )
    for rank in range(len(rows)):
        if rank not in placement:
            raise ScheduleError(
                f"rank {rank} holds no stage (placement={placement}); every rank needs at least one. Use fewer rows, "
                "or more stages."
            )


def _check_cells(rows: Rows, placement: tuple[int, ...]) -> dict[Op, tuple[int, int]]:
    """The (row, column) of each op; raises if a cell is no op, is on the wrong rank, or occurs twice."""
    cells: dict[Op, tuple[int, int]] = {}
    for rank, row in enumerate(rows):
        for column, op in enumerate(row):
            if op is None:
                continue
            where = f"row {rank}, column {column}"
            if not isinstance(op, Op):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not be typed
                raise ScheduleError(
                    f"{where} holds {show(op)}, which is not an Op; write Op('F', stage, micro_batch) or None for an idle "
                    "cell, or read text with Schedule.from_csv."
                )
            if op.stage >= len(placement):
                raise ScheduleError(
                    f"{op} ({where}) belongs to stage {op.stage}, but placement has {len(placement)} stages, "
                    f"0..{len(placement) - 1}. Add the stage to placement, or correct the cell."
                )
            if placement[op.stage] != rank:
                raise ScheduleError(
                    f"{op} is in {where}, but placement puts stage {op.stage} on rank {placement[op.stage]}. A stage "
                    "lives on one rank: move the cell, or change the placement."
                )
            if op in cells:
                raise ScheduleError(
                    f"{op} occurs twice, in {where} and in row {cells[op][0]}, column {cells[op][1]}; every op must "
                    "occur once. Remove one of them."
                )
            cells[op] = rank, column
    return cells


def _check_complete(cells: Mapping[Op, object], num_stages: int) -> None:
    num_micro_batches = 1 + max((op.micro_batch for op in cells), default=-1)
    if num_micro_batches == 0:
        raise ScheduleError("the table has idle cells only; it needs at least one micro-batch.")
    forward_only = all(op.kind == "F" for op in cells)
    because = f"the table has {num_micro_batches} micro-batches, 0..{num_micro_batches - 1}, and every stage runs each"
    for stage in range(num_stages):
        for micro_batch in range(num_micro_batches):
            forward = Op("F", stage, micro_batch)
            if forward not in cells:
                raise ScheduleError(f"{forward} is missing: {because}. Add the cell {forward} to its row.")
            if forward_only:
                continue
            full, split = [Op("B", stage, micro_batch)], [Op("I", stage, micro_batch), Op("W", stage, micro_batch)]
            found = [op for op in full + split if op in cells]
            if found not in (full, split):
                raise ScheduleError(
                    f"the backward of stage {stage} for micro-batch {micro_batch} is wrong: the table holds "
                    f"{' and '.join(map(str, found)) or 'none of its ops'}. It must hold either {full[0]} alone, or "
                    f"both {split[0]} and {split[1]}."
                )


def _check_deadlock(rows: Rows, num_stages: int, split: frozenset[tuple[int, int]]) -> None:
    starts = earliest_starts(rows, lambda op: needs(op, num_stages, split))
    waiting: list[str] = []
    for rank, row in enumerate(rows):
        stuck = next((op for op in row if op is not None and op not in starts), None)
        if stuck is not None:
            missing = " and ".join(str(op) for op in needs(stuck, num_stages, split) if op not in starts)
            waiting.append(f"rank {rank} is at {stuck} and waits for {missing}")
    if waiting:
        raise ScheduleError(
            f"deadlock: {'; '.join(waiting)}. A rank works through its row in order, so each op must come after the "
            "ops it needs: move the waited-for op forward in its row, or the waiting op back."
        )
