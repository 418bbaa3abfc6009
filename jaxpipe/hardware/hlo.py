"""Reads the text of an optimized HLO module: computations, their instructions in the order of the schedule, and shapes.

It reads what XLA prints for TPU, GPU and CPU, and only what reports need of it. One instruction is one line:

    %name = f32[8,128]{1,0:T(8,128)} opcode(%operand, %operand), attribute=..., metadata={op_name="..."}
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
# Instructions that compute nothing.
MOVES = frozenset(
    {
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "broadcast",
        "copy",
        "transpose",
        "reshape",
        "slice",
    }
    | {"dynamic-slice", "clamp", "iota"}
)


@dataclass(frozen=True)
class Shape:
    """One array: dtype as HLO writes it, dims, and the layout with its tiles and memory space as text."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 0
        return math.prod(self.dims) * bits // 8

    @property
    def order(self) -> str:
        """The order of the dims in memory, without tiles and memory space: `2,1,0`."""
        return self.layout.split(":")[0]

    @property
    def space(self) -> int:
        """The number of the memory space; 0 is the chip's main memory."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      name, opcode: as they stand there.
      shapes: the arrays of the result, those of a tuple one after the other.
      operands: the names of other instructions.
      attributes: the rest of the line.
      called: computations by role, such as "body"; those of a conditional are "branch 0", "branch 1" and so on.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str = field(repr=False)
    called: Mapping[str, str]

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @cached_property
    def op_name(self) -> str:
        """The name scopes under which the operation was traced; "" if XLA does not say."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @cached_property
    def cycles(self) -> int:
        """What the TPU compiler estimates; 0 if it says nothing."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else 0

    @cached_property
    def known_trips(self) -> int | None:
        """How often a loop runs, if XLA has written it down."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they are started; the last one that is marked ROOT is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclass(frozen=True)
class Module:
    """All computations by name, and the name of the one where the program begins."""

    computations: Mapping[str, Computation]
    entry: str

    def fused(self, instruction: Instruction) -> frozenset[str]:
        """The opcodes in a fusion, or that of any other instruction."""
        computation = self.computations.get(instruction.called.get("calls", ""))
        if instruction.opcode != "fusion" or computation is None:
            return frozenset({instruction.opcode})
        return frozenset().union(*(self.fused(inner) for inner in computation))

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs, if that can be read; None if it depends on values."""
        if loop.known_trips is not None:
            return loop.known_trips
        condition = self.computations[loop.called["condition"]]
        root = condition.instructions[condition.root]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = condition.instructions[root.operands[1]]
        if limit.opcode != "constant":
            return None
        found = re.match(r"(\d+)\)", limit.attributes)
        return int(found[1]) if found else None


def parse(text: str) -> Module:
    """Reads a module as `jax.stages.Compiled.as_text()` gives it."""
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith("}"):
            if name:
                computations[name] = Computation(name, instructions, root)
            name = ""
        elif line[:1] not in ("", " ") and (head := _HEAD.match(line)):
            name, root, instructions = head[2], "", {}
            entry = name if head[1] else entry
        elif name and (match := _LINE.match(line)):
            found = _instruction(match[2], line[match.end() :])
            instructions[found.name] = found
            if match[1]:
                root = found.name
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(match[1], tuple(int(size.lstrip("<=")) for size in match[2].split(",") if size), match[3] or "")
        for match in _SHAPE.finditer(rest[:end])
    )
    opcode, _, tail = rest[end:].strip().partition("(")
    stop = _closing("(" + tail, 0) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", tail[:stop]))
    # A constant has its value where others have operands.
    attributes = tail if opcode == "constant" else tail[stop + 1 :]
    called = dict(_CALLED.findall(attributes))
    inner = [name for names, single in _BRANCHES.findall(attributes) for name in (names or single).split(",")]
    called |= {f"branch {number}": name.strip().lstrip("%") for number, name in enumerate(inner)}
    return Instruction(name, opcode, shapes, operands, attributes, called)


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`; the end if there is none."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if depth == 0:
                return at
    return len(text)
