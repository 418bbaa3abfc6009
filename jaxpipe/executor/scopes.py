"""The name scopes of what the compiled loop does, by which a report about a compiled program knows whose an instruction is.

They stand in the `op_name` of each instruction, before the names of the layer's own operations, and profilers show them.
A micro-batch has no name: all of them run the same instructions.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxpipe.columns import ranges

# Layers behind the last unit, loss, and their backward.
TAIL = "jaxpipe.tail"
# What runs in unusual steps only.
RARE = "jaxpipe.rare"
# Outside of the ops: transfers between ranks; what the weights go through before the loop, and gradients behind it; the
# optimizer, with the norm of the gradient.
PERMUTE, WEIGHTS, GRADIENTS = "jaxpipe.permute", "jaxpipe.weights", "jaxpipe.gradients"
OPTIMIZER = "jaxpipe.optimizer"


class Scope(NamedTuple):
    """What the name of an instruction says.

    Attributes:
      kind: of the op, such as "F"; None outside of all branches.
      program: the number of the stage program; -1 outside of all branches.
      tail: whether it belongs to the tail.
      rare: whether it runs in unusual steps only.
    """

    kind: str | None
    program: int
    tail: bool
    rare: bool


def of_op(kind: str, program: int, program_ids: Sequence[int] = ()) -> str:
    """The scope of the branch that runs an op of a stage program, such as `jaxpipe.F1/stages_1-3`.

    Args:
      program_ids: per stage, the stage program that it runs: the stages that share this one are named. None are without it.
    """
    stages = [stage for stage, own in enumerate(program_ids) if own == program]
    text = ranges(stages).replace(", ", "_")
    return f"jaxpipe.{kind}{program}" + (f"/stage{'s' * (len(stages) > 1)}_{text}" if stages else "")


def read(op_name: str) -> Scope:
    """What an `op_name` says."""
    found = re.search(r"\bjaxpipe\.([A-Z])(\d+)\b", op_name)
    kind, program = (None, -1) if found is None else (found[1], int(found[2]))
    return Scope(kind, program, TAIL in op_name, RARE in op_name)
