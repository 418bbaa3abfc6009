"""Where the instructions of a compiled step are: before and after the ticks, in the body of a loop over ticks, in a branch.

A branch is a loop of no or one iteration, and so is not told from other loops by its form, but by name scopes: that of the
op is on what is inside, and not on the loop itself. A loop over ticks is one that has branches directly inside.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxpipe.executor import scopes
from jaxpipe.hardware.hlo import Computation, Instruction, Module

# Parts of a step.
FORWARD, BACKWARD, TAIL, LOOP, OUTSIDE = "forward", "backward", "tail", "loop", "outside"


class Op(NamedTuple):
    """What a branch runs: the kind of op, and the number of the stage program."""

    kind: str
    program: int


@dataclass(frozen=True)
class Block:
    """A computation that is run as it stands, and not as a part of a fusion.

    Attributes:
      computation: its instructions.
      loop: the number of the loop over ticks that it is in, in the order of the program; -1 outside of all.
      branch: the number of the branch that it is in, in the order of the program; -1 in none.
      op: what that branch runs; None in none.
      times: how often it is run, each time the branch, or else the body of the loop, or else the step is run. What depends
        on values is counted once.
      iterations: how often the loop over ticks runs; None if it depends on values.
    """

    computation: Computation
    loop: int = -1
    branch: int = -1
    op: Op | None = None
    times: int = 1
    iterations: int | None = None

    def part(self, instruction: Instruction) -> str:
        """The part of the step that an instruction of this block belongs to."""
        if scopes.read(instruction.op_name).tail:
            return TAIL
        if self.op is not None:
            return FORWARD if self.op.kind == "F" else BACKWARD
        return LOOP if self.loop >= 0 else OUTSIDE


def blocks(module: Module) -> list[Block]:
    """The blocks of a module, in the order of the program; without what runs in unusual steps only."""
    return list(_Walk(module).visit(Block(module.computations[module.entry])))


class _Walk:
    def __init__(self, module: Module):
        self.module = module
        self._ops: dict[str, Counter[Op]] = {}
        self._num_loops = self._num_branches = 0

    def visit(self, block: Block) -> Iterator[Block]:
        yield block
        for instruction in block.computation:
            if instruction.opcode == "while":
                yield from self._loop(block, instruction)
            elif instruction.opcode in ("conditional", "call", "async-start"):
                for name in self._inner(instruction):
                    if self._is_rare(name):
                        continue
                    yield from self._enter(block, name, self._is_branch(block, instruction, name), None)

    def _loop(self, block: Block, loop: Instruction) -> Iterator[Block]:
        body, trips = loop.called["body"], self.module.trips(loop)
        if block.op is None and self._holds_branches(body):
            computation = self.module.computations[body]
            if block.loop >= 0:  # rounds of ticks, with a pause after each: one loop over ticks in all
                yield from self.visit(Block(computation, block.loop))
                return
            self._num_loops += 1
            yield from self.visit(Block(computation, self._num_loops - 1, iterations=trips))
        else:
            yield from self._enter(block, body, self._is_branch(block, loop, body), trips)

    def _enter(self, block: Block, name: str, is_branch: bool, trips: int | None) -> Iterator[Block]:
        inner = replace(block, computation=self.module.computations[name], times=block.times * (trips or 1))
        if is_branch:
            op = self._found(name).most_common(1)[0][0]
            inner = replace(inner, branch=self._num_branches, op=op, times=1)
            self._num_branches += 1
        yield from self.visit(inner)

    def _is_branch(self, block: Block, instruction: Instruction, body: str) -> bool:
        outside = block.op is None and scopes.read(instruction.op_name).kind is None
        return outside and bool(self._found(body))

    def _holds_branches(self, body: str) -> bool:
        """Whether something in the body, or in rounds directly inside, is a branch."""
        for instruction in self.module.computations[body]:
            if instruction.opcode not in ("while", "conditional") or scopes.read(instruction.op_name).kind is not None:
                continue
            if any(self._found(name) for name in self._inner(instruction)):
                return True
        return False

    def _found(self, name: str) -> Counter[Op]:
        """How many instructions of a computation, and of those inside, are of which op."""
        if name not in self._ops:
            self._ops[name] = found = Counter[Op]()
            for instruction in self.module.computations[name]:
                scope = scopes.read(instruction.op_name)
                if scope.kind is not None:
                    found[Op(scope.kind, scope.program)] += 1
                for inner in self._inner(instruction):
                    found += self._found(inner)
            self._ops[name] = found
        return self._ops[name]

    def _is_rare(self, name: str) -> bool:
        return any(scopes.read(instruction.op_name).rare for instruction in self.module.computations[name])

    def _inner(self, instruction: Instruction) -> list[str]:
        if instruction.opcode == "fusion":
            return []
        return [
            name
            for role, name in instruction.called.items()
            if (role in ("body", "calls") or role.startswith("branch") or instruction.opcode == "call")
            and name in self.module.computations
        ]
