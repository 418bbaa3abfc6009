"""How often ranks run each op, and how long the ticks of a program take when the cost of each op is known."""

from collections.abc import Callable, Mapping

from jaxpipe.hardware.structure import Op
from jaxpipe.lowering.pace import Pace, pace
from jaxpipe.lowering.program import IDLE, Cell, Program


def runs(program: Program, op_of: Callable[[Cell], Op]) -> list[dict[Op, int]]:
    """For each rank, how often it runs each op in a step."""
    found: list[dict[Op, int]] = [{} for _ in range(program.num_ranks)]
    for row in program.cells:
        for rank, cell in enumerate(row):
            if cell.kind != IDLE:
                op = op_of(cell)
                found[rank][op] = found[rank].get(op, 0) + 1
    return found


def ticks(
    program: Program,
    op_of: Callable[[Cell], Op],
    cost: Mapping[Op, float],
    overhead: float = 0.0,
    permute: float = 0.0,
) -> Pace:
    """Walks through the ticks; see `lowering/pace.py`.

    Args:
      op_of: what the branch of a cell that is not idle runs.
      cost: of one run of each op.
    """
    return pace(program, lambda cell: cost.get(op_of(cell), 0.0), overhead, permute)
