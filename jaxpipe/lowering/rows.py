"""Rows of integers: what the compiled loop looks up at each tick. No other code knows the order of the columns."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxpipe.lowering.program import Cell, Program

# An integer of a row: a Python int where rows are made, a traced int32 scalar where the loop reads them.
Int = Any


class Now(NamedTuple):
    """What an op is told about the present tick.

    Attributes:
      stage, micro_batch: of the op.
      slots: per pool, the slot that the op writes or reads.
      read: the arrival slot of the message that the op reads.
    """

    stage: Int
    micro_batch: Int
    slots: dict[str, Int]
    read: Int


class Row(NamedTuple):
    """One rank's row of the table.

    Attributes:
      branch: which branch of the tick runs, counted from 1; 0 is none.
      now: what that branch is told.
      arrive: per channel, the arrival slot for the message that this tick's permute brings; -1: it brings none.
    """

    branch: Int
    now: Now
    arrive: tuple[Int, ...]


@dataclass(frozen=True)
class Columns:
    """The columns of a program's rows: branch, stage, micro_batch, read, then a slot per pool, then one per channel."""

    pools: tuple[str, ...]
    num_channels: int

    @classmethod
    def of(cls, program: Program) -> "Columns":
        return cls(tuple(program.pools), len(program.channels))

    def __len__(self) -> int:
        return 4 + len(self.pools) + self.num_channels

    def encode(self, cell: Cell, branch: int) -> list[int]:
        """The row of a cell. A cell without slots has -1 in their columns."""
        slots = cell.slots or (-1,) * len(self.pools)
        arrive = cell.arrive or (-1,) * self.num_channels
        assert (len(slots), len(arrive)) == (len(self.pools), self.num_channels), f"{cell} does not fit {self}"
        return [branch, cell.stage, cell.micro_batch, cell.read, *slots, *arrive]

    def decode(self, row: Any) -> Row:
        """The inverse, for anything that is indexed like a sequence of integers: a list, or a traced array."""
        behind = 4 + len(self.pools)
        slots = {pool: row[4 + number] for number, pool in enumerate(self.pools)}
        arrive = tuple(row[behind + number] for number in range(self.num_channels))
        return Row(row[0], Now(row[1], row[2], slots, row[3]), arrive)
