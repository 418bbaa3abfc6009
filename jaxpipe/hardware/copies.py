"""Copies in the ticks of a compiled step: memory traffic that computes nothing, and what it moves as far as shapes tell."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from jaxpipe.hardware.hlo import MOVES, Instruction, Module, Shape
from jaxpipe.hardware.structure import Block

WEIGHTS, GRADIENTS, SAVED, MESSAGE = "weights", "gradients", "saved", "message"
OTHER = "other"


class Copy(NamedTuple):
    """Like copies of a step.

    Attributes:
      what: "weights" (a stack, one layer of it, or a single layer), "gradients" (their sums), "saved" (the whole buffer of
        what forwards keep), "message" (of the shape that travels between stages, or of one saved value), or "other". Told
        by the shape; "weights or gradients" where both have it.
      shape: of one of them, as HLO writes it.
      bytes: of one of them.
      count: how many a device makes in a step; of those inside branches, the rank that makes most.
      cycles: of one of them, if the TPU compiler says.
      part: of the step: "loop" is between the branches in every tick.
    """

    what: str
    shape: str
    bytes: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # of tuples, which nobody wants here
    cycles: int
    part: str


class Known:
    """Which arrays have which shape.

    Args:
      trees: by what they are, shapes; the first dim of a tree's leaf may be cut off.
    """

    def __init__(self, trees: Mapping[str, Any]):
        self._names: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for what, tree in trees.items():
            for leaf in jax.tree.leaves(tree):
                self._add(what, leaf.dtype, leaf.shape)
                if what in (WEIGHTS, GRADIENTS):
                    self._add(what, leaf.dtype, leaf.shape[1:])  # one layer of a stack

    def _add(self, what: str, dtype: Any, dims: Iterable[int]) -> None:
        names = self._names.setdefault((_dtype(dtype), _dims(dims)), [])
        if what not in names:
            names.append(what)

    def what(self, shape: Shape) -> str:
        """What an array of this shape is; the order of the dims and dims of 1 do not matter."""
        return " or ".join(self._names.get((shape.dtype, _dims(shape.dims)), [OTHER]))


def find(module: Module, block: Block, known: Known) -> list[Copy]:
    """The copies in a block of the ticks; `count` is 1."""
    if block.loop < 0 and block.op is None:
        return []
    found: list[Copy] = []
    for instruction in block.computation:
        if _copies(module, block, instruction):
            shape = instruction.shapes[0]
            found.append(
                Copy(known.what(shape), str(shape), shape.bytes, 1, instruction.cycles, block.part(instruction))
            )
    return found


def _copies(module: Module, block: Block, instruction: Instruction) -> bool:
    if not instruction.shapes:
        return False
    to = instruction.shapes[0]
    if instruction.opcode == "copy-start":
        return _moves(instruction.shapes[1], to)
    if instruction.opcode == "copy":
        source = block.computation.instructions.get(instruction.operands[0])
        return source is None or not source.shapes or _moves(source.shapes[0], to)
    if instruction.opcode != "fusion":
        return False
    inside = module.fused(instruction)
    return inside <= MOVES and bool(inside & {"copy", "transpose"})


def _moves(source: Shape, to: Shape) -> bool:
    """Whether it is a copy, and not a fetch into a faster memory in the same layout, or the way back."""
    return source.space == to.space or source.order != to.order


def _dims(dims: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size != 1))


def _dtype(dtype: Any) -> str:
    name = str(dtype)
    letters = {"float": "f", "bfloat": "bf", "uint": "u", "int": "s", "bool": "pred", "complex": "c"}
    word = name.rstrip("0123456789")
    return letters.get(word, word) + name[len(word) :]
