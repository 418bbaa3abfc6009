"""One cell of a schedule, and the law that says which cells it has to wait for."""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from jaxpipe.checks import as_integer, show
from jaxpipe.errors import ScheduleError

Kind = Literal["F", "B", "I", "W"]

_CELL = re.compile(r"(\d{1,9})([FBIW])(\d{1,9})", re.ASCII)


@dataclass(frozen=True, order=True, slots=True)
class Op:
    """What a rank does in one tick: one kind of work, of one stage, for one micro-batch.

    `kind` is `F` forward, `B` full backward, `I` input gradient or `W` weight gradient; `B` is `I` and `W` in one go.
    `str(op)` is the cell grammar of the CSV files, stage first: `2B5` is the backward of stage 2 for micro-batch 5.
    """

    kind: Kind
    stage: int
    micro_batch: int

    def __post_init__(self):
        if self.kind not in ("F", "B", "I", "W"):
            raise ScheduleError(
                f"kind={show(self.kind)} is not a kind of op; use 'F' (forward), 'B' (backward), 'I' (input gradient) "
                "or 'W' (weight gradient)."
            )
        for name in ("stage", "micro_batch"):
            value = getattr(self, name)
            number = value if type(value) is int else as_integer(value)
            if number is None or number < 0:
                raise ScheduleError(
                    f"Op({self.kind!r}, stage={show(self.stage)}, micro_batch={show(self.micro_batch)}): stages and "
                    "micro-batches are integers and count from 0."
                )
            if number is not value:
                object.__setattr__(self, name, number)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> "Op":
        """`Op.parse("2B5")` is `Op("B", 2, 5)`. Raises `ScheduleError` on any other grammar."""
        match = _CELL.fullmatch(text) if isinstance(text, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if match is None:
            raise ScheduleError(
                f"{show(text)} is not an op; write stage, kind and micro-batch, such as 0F3, with kind one of F, B, I, W."
            )
        stage, kind, micro_batch = match.groups()
        return cls(cast(Kind, kind), int(stage), int(micro_batch))


Row: TypeAlias = tuple[Op | None, ...]
Rows: TypeAlias = tuple[Row, ...]


def needs(op: Op, num_stages: int, split: Container[tuple[int, int]]) -> tuple[Op, ...]:
    """The ops that have to be finished before `op` may start: the whole dependency law of a pipeline.

        F(s, m)          after F(s-1, m)
        B(s, m), I(s, m) after F(s, m), and after B(s+1, m) or I(s+1, m), whichever that stage has
        W(s, m)          after I(s, m)

    `split` holds the (stage, micro_batch) pairs whose backward comes as I and W. It is per pair, not per table: tables
    that use B where nothing is gained by splitting are common (torch's lowering merges adjacent I and W into B).
    """
    stage, micro_batch = op.stage, op.micro_batch
    if op.kind == "F":
        return (Op("F", stage - 1, micro_batch),) if stage > 0 else ()
    if op.kind == "W":
        return (Op("I", stage, micro_batch),)
    own_forward = Op("F", stage, micro_batch)
    if stage == num_stages - 1:
        return (own_forward,)  # the loss sits on the last stage: its gradient comes from nowhere else
    downstream: Kind = "I" if (stage + 1, micro_batch) in split else "B"
    return (own_forward, Op(downstream, stage + 1, micro_batch))
