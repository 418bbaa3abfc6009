"""One cell of a schedule, and the rule that says for which cells it has to wait."""

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

    `str(op)` is a cell of the CSV files, with the stage first: `2B5` is the backward of stage 2 for micro-batch 5.

    Attributes:
      kind: `F` forward, `B` full backward, `I` input gradient or `W` weight gradient. `B` does the work of `I` and `W`.
      stage: from 0.
      micro_batch: from 0.

    Raises:
      ScheduleError: the kind is unknown, or a number is no integer of at least 0.
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
        """Reads a cell: `Op.parse("2B5")` is `Op("B", 2, 5)`.

        Raises:
          ScheduleError: the text is something else.
        """
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
    """The ops that have to be finished before `op` may start. A pipeline has only these dependencies:

        F(s, m)          after F(s-1, m)
        B(s, m), I(s, m) after F(s, m), and after B(s+1, m) or I(s+1, m), whichever that stage has
        W(s, m)          after I(s, m)

    Args:
      num_stages: S.
      split: the (stage, micro_batch) pairs whose backward comes as I and W. Some tables split the backward of some pairs
        only, and use B where nothing is gained by splitting (torch's lowering merges adjacent I and W into B).
    """
    stage, micro_batch = op.stage, op.micro_batch
    if op.kind == "F":
        return (Op("F", stage - 1, micro_batch),) if stage > 0 else ()
    if op.kind == "W":
        return (Op("I", stage, micro_batch),)
    own_forward = Op("F", stage, micro_batch)
    if stage == num_stages - 1:
        return (own_forward,)  # the last stage has the loss, so it needs no gradient from another stage
    downstream: Kind = "I" if (stage + 1, micro_batch) in split else "B"
    return (own_forward, Op(downstream, stage + 1, micro_batch))
