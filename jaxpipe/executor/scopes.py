"""The name scopes of what the compiled loop does, by which a report about a compiled program knows whose an instruction is.

They stand in the `op_name` of each instruction, before the names of the layer's own operations.
"""

import re
from typing import NamedTuple

# Layers behind the last unit, loss, and their backward.
TAIL = "jaxpipe.tail"
# What runs in unusual steps only.
RARE = "jaxpipe.rare"


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


def of_op(kind: str, program: int) -> str:
    """The scope of the branch that runs an op of a stage program."""
    return f"jaxpipe.{kind}{program}"


def read(op_name: str) -> Scope:
    """What an `op_name` says."""
    found = re.search(r"\bjaxpipe\.([A-Z])(\d+)\b", op_name)
    kind, program = (None, -1) if found is None else (found[1], int(found[2]))
    return Scope(kind, program, TAIL in op_name, RARE in op_name)
