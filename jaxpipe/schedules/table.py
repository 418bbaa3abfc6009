"""The schedule table. It is frozen and checked when it is made; everything else about it is derived."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxpipe.checks import show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.check import check_rows, split_pairs
from jaxpipe.schedules.clock import earliest_starts
from jaxpipe.schedules.op import Op, Row, Rows, needs
from jaxpipe.schedules.text import grid, placement_of, rows_from_csv, rows_to_csv


@dataclass(frozen=True, repr=False)
class Schedule:
    """Says which rank computes which ops, in which order.

    Making a table checks that every op occurs once and on its rank, and that the ranks cannot deadlock. A table without
    any backward op is a forward-only table.

    Attributes:
      rows: one row per rank, a sequence of `Op`, with `None` for an idle cell. The order within a row is binding. The
        columns only propose a common clock; see `ticks`.
      placement: the rank of each stage.

    Raises:
      ScheduleError: the table is wrong; the message says how to repair it.
    """

    rows: Rows
    placement: tuple[int, ...]

    def __post_init__(self):
        try:
            object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
            object.__setattr__(self, "placement", tuple(self.placement))
        except TypeError:
            raise ScheduleError(
                f"rows={show(self.rows)}, placement={show(self.placement)}: expected one sequence of ops per rank, and the "
                "rank of each stage. Schedule.from_csv reads text and files."
            ) from None
        check_rows(self.rows, self.placement)

    @classmethod
    def from_ticks(cls, tick_of: Mapping[Op, int], placement: tuple[int, ...]) -> "Schedule":
        """Makes a table of the tick of each op, which is how a schedule that is known as a formula is written down.

        Raises:
          ScheduleError: two ops of a rank have one tick, or the table is wrong.
        """
        num_ticks = 1 + max(tick_of.values(), default=-1)
        rows: list[list[Op | None]] = [[None] * num_ticks for _ in range(1 + max(placement, default=-1))]
        for op, tick in tick_of.items():
            row = rows[placement[op.stage]]
            if row[tick] is not None:
                raise ScheduleError(
                    f"{op} and {row[tick]} are both at tick {tick} of rank {placement[op.stage]}; a rank does one op "
                    "per tick."
                )
            row[tick] = op
        return cls(rows=tuple(map(tuple, rows)), placement=placement)

    @classmethod
    def from_order(cls, order: Sequence[Sequence[Op]], placement: tuple[int, ...]) -> "Schedule":
        """Makes a table of the order in which each rank works. Every op takes one tick, and comes as early as it can.

        Raises:
          ScheduleError: the table is wrong.
        """
        rows: Rows = tuple(map(tuple, order))
        split = split_pairs(op for row in order for op in row)
        starts = earliest_starts(rows, lambda op: needs(op, len(placement), split))
        if len(starts) < sum(map(len, rows)):
            return cls(rows=rows, placement=placement)  # which says who waits for whom
        return cls.from_ticks({op: int(start) for op, start in starts.items()}, placement)

    @classmethod
    def from_csv(cls, text_or_path: str | os.PathLike[str]) -> "Schedule":
        """Reads a table with one line per rank and cells such as `0F3`; an empty cell is idle.

        The placement follows from the rows.

        Args:
          text_or_path: a `str` of one line that ends in `.csv`, or an `os.PathLike`, is a path. Another `str` is the text.

        Raises:
          ScheduleError: the file cannot be read, or the table is wrong; rows and columns in the message count from 0.
        """
        if not isinstance(text_or_path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ScheduleError(
                f"Schedule.from_csv({show(text_or_path)}): expected the text of a table, or the path of a .csv file."
            )
        if not is_path(text_or_path):
            rows = rows_from_csv(str(text_or_path))
            return cls(rows=rows, placement=placement_of(rows))
        try:
            text = Path(text_or_path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a path with a zero byte
            why = error.strerror if isinstance(error, OSError) and error.strerror else f"it is no UTF-8 text ({error})"
            raise ScheduleError(
                f"cannot read the schedule file {os.fspath(text_or_path)!r}: {why}. Give the path of a CSV with one row "
                "per rank."
            ) from error
        try:
            return cls.from_csv(text + "\n")
        except ScheduleError as error:
            raise ScheduleError(f"{os.fspath(text_or_path)}: {error}") from None

    def to_csv(self) -> str:
        """The table as text, which `from_csv` reads back as an equal schedule."""
        return rows_to_csv(self.rows)

    @property
    def num_ranks(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        """S, over all ranks."""
        return len(self.placement)

    @cached_property
    def num_micro_batches(self) -> int:
        """M."""
        return 1 + max(op.micro_batch for row in self.rows for op in row if op is not None)

    @cached_property
    def num_chunks(self) -> int:
        """The number of stages of a rank, for the rank that has most."""
        return max(self.placement.count(rank) for rank in range(self.num_ranks))

    @cached_property
    def forward_only(self) -> bool:
        """Whether the table has no backward op."""
        return all(op is None or op.kind == "F" for row in self.rows for op in row)

    @property
    def split_backward(self) -> bool:
        """Whether the backward of any stage and micro-batch comes as I and W."""
        return bool(self._split)

    @cached_property
    def _split(self) -> frozenset[tuple[int, int]]:
        return split_pairs(op for row in self.rows for op in row if op is not None)

    def needs(self, op: Op) -> tuple[Op, ...]:
        """The ops of this table that have to be finished before `op` may start."""
        return needs(op, self.num_stages, self._split)

    @cached_property
    def ticks(self) -> Rows:
        """The rows on a common clock: all have one length, and each op is in a column after those of all ops it needs.

        If the columns of the rows are such a clock, they stay, and the rows are padded with idle cells. The author of such
        a table chose its idle cells: 1F1B leaves every second one empty so that neighbours alternate. If the rows only
        order the ops, as in some files, each op takes one tick and comes as early as possible.
        """
        column_of = {op: column for row in self.rows for column, op in enumerate(row) if op is not None}
        aligned = all(column_of[source] < column for op, column in column_of.items() for source in self.needs(op))
        if aligned:
            num_ticks = max(map(len, self.rows))
            return tuple(row + (None,) * (num_ticks - len(row)) for row in self.rows)
        starts = {op: int(start) for op, start in earliest_starts(self.rows, self.needs).items()}
        return tuple(_at(starts, row, 1 + max(starts.values())) for row in self.rows)

    def __str__(self) -> str:
        return grid(self.ticks, show_stage=self.num_chunks > 1)

    def __repr__(self) -> str:
        chunks = f" x {self.num_chunks} chunks" if self.num_chunks > 1 else ""
        return (
            f"<Schedule {self.num_ranks} ranks{chunks} x {self.num_micro_batches} micro-batches, "
            f"{len(self.ticks[0])} ticks>"
        )


def is_path(text_or_path: str | os.PathLike[str]) -> bool:
    """Whether the argument is the path of a CSV file, and not the text of a table or the name of a schedule."""
    return isinstance(text_or_path, os.PathLike) or (text_or_path.lower().endswith(".csv") and "\n" not in text_or_path)


def _at(starts: Mapping[Op, int], row: Row, num_ticks: int) -> Row:
    cells: list[Op | None] = [None] * num_ticks
    for op in row:
        if op is not None:
            cells[starts[op]] = op
    return tuple(cells)
