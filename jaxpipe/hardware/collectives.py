"""The collectives of a compiled step: what travels over which axes, how often, and whether something is done meanwhile."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxpipe.hardware.hlo import MOVES, Computation, Instruction, Module
from jaxpipe.hardware.structure import Block

KINDS = (
    "collective-permute",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# Instructions that run other ones, and those that compute if they are large enough.
_RUNS = frozenset({"while", "conditional", "call"})
_COMPUTES = frozenset({"fusion", "dot", "convolution", "custom-call", "reduce", "sort", "scatter", "gather"})
_SMALL = 1 << 16


class Collective(NamedTuple):
    """Like collectives of a step.

    Attributes:
      kind: "collective-permute", "all-reduce", "all-gather", "reduce-scatter", "all-to-all" and so on.
      bytes: of one of them on one device: the larger of what goes in and what comes out.
      count: how many a device runs in a step; of those inside branches, the rank that runs most.
      asynchronous: whether start and end are apart in the schedule, with work between them.
      where: the part of the step, and the mesh axes: "loop over pipe" is between the branches in every tick, "backward over
        model" inside a branch, "outside over data" before or after the ticks.
    """

    kind: str
    bytes: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # of tuples, which nobody wants here
    asynchronous: bool
    where: str

    @property
    def part(self) -> str:
        """The part of the step: "forward", "backward", "tail", "loop" or "outside"."""
        return self.where.split()[0]

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes along which devices talk."""
        return tuple(filter(None, self.where.partition(" over ")[2].split(", ")))


def find(module: Module, block: Block, mesh: Mesh) -> list[Collective]:
    """The collectives that stand in a block; `count` is how many of them one run of the block has, each 1."""
    found: list[Collective] = []
    order = list(block.computation)
    for at, instruction in enumerate(order):
        inner = _collective_in(module, instruction)
        if inner is None:
            continue
        kind, talks = inner
        done = _done(block.computation, instruction)
        came = instruction.bytes if done is None else done.bytes
        went = sum(block.computation.instructions[name].bytes for name in instruction.operands)
        axes = _axes(talks, mesh)
        where = f"{block.part(instruction)}{' over ' if axes else ''}{', '.join(axes)}"
        found.append(Collective(kind, max(came, went), 1, _overlaps(module, order, at, done), where))
    return found


def _collective_in(module: Module, instruction: Instruction) -> tuple[str, Instruction] | None:
    """The kind of an instruction that is a collective or wraps one, and the instruction that says who takes part."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return kind, instruction
    if instruction.opcode not in ("fusion", "async-start") or "collective-done" in instruction.name:
        return None
    computation = module.computations.get(instruction.called.get("calls", ""))
    for inner in computation or ():
        kind = inner.opcode.removesuffix("-start")
        if kind in KINDS:
            # The TPU compiler writes a reduce-scatter as one fusion of an all-reduce and a slice of its result.
            cut = kind == "all-reduce" and 2 * instruction.bytes <= inner.bytes
            return ("reduce-scatter" if cut else kind), inner
    return None


def _done(computation: Computation, start: Instruction) -> Instruction | None:
    """The end of an asynchronous pair; None if it is no start."""
    if not (start.opcode.endswith("-start") or "collective-start" in start.name):
        return None
    ends = (other for other in computation if start.name in other.operands)
    return next((end for end in ends if end.opcode.endswith("-done") or "collective-done" in end.name), None)


def _overlaps(module: Module, order: Sequence[Instruction], at: int, done: Instruction | None) -> bool:
    """Whether an instruction that works stands between the start at that place and its end."""
    if done is None or re.search(r'"is_sync":\s*true', order[at].attributes):
        return False
    return any(_works(module, between) for between in order[at + 1 : order.index(done)])


def _works(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode in _RUNS:
        return True
    large = instruction.opcode in _COMPUTES and instruction.bytes >= _SMALL
    return large and not module.fused(instruction) <= MOVES


# ------------------------------------------------------------------------------------------------------------- who talks


def _axes(talks: Instruction, mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the members of a group differ; () if that cannot be read."""
    shape = tuple(mesh.shape.values())
    differ = np.zeros(len(shape), bool)
    for group in _groups(talks.attributes, mesh.size):
        places = np.asarray(np.unravel_index(np.asarray(group) % mesh.size, shape))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, varies in zip(mesh.axis_names, differ, strict=True) if varies)


def _groups(attributes: str, size: int) -> list[list[int]]:
    """The groups of devices that talk, by their places in the mesh. XLA writes them in one of four ways."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [list(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return groups or [list(range(size))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = (tuple(map(int, part.split(","))) for part in iota.groups()[:2])
        order = tuple(map(int, iota[3].split(","))) if iota[3] else tuple(range(len(dims)))
        return np.arange(size).reshape(dims).transpose(order).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? *\{([^}]*)\}", attributes):
        return _named_groups(named[1], named[2], named[3], size)
    return []


def _named_groups(axes: str, devices: str | None, used: str, size: int) -> list[list[int]]:
    """Groups along named axes: `'a'=2,'b'=4`, `[4,2]T(1,0)` and `'b':(2)2`, which is a part of b: 2, after a part of 2.

    Args:
      axes: names and sizes.
      devices: the order of the devices, as a list or as the transposition of an array; None: as they are counted.
      used: the axes along which the members of a group differ.
    """
    sizes = {name: int(count) for name, count in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = np.arange(size)
    if turned := re.fullmatch(r"\[([\d,]+)\]T\(([\d,]+)\)", devices or ""):
        shape, dims = (tuple(map(int, part.split(","))) for part in turned.groups())
        order = order.reshape(shape).transpose(dims).reshape(-1)
    elif devices and re.fullmatch(r"[\d,]+", devices):
        order = np.asarray(list(map(int, devices.split(","))))
    pieces: list[tuple[int, bool]] = []  # sizes of the dims, and whether groups go along them
    taken = {name: (before, count) for name, before, count in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)}
    for name, whole in sizes.items():
        before, count = taken.get(name, ("", ""))
        if before:
            pieces += [(int(before), False), (int(count), True), (whole // int(before) // int(count), False)]
        else:
            pieces.append((whole, name in taken))
    grid = order.reshape([count for count, _ in pieces])
    inner = [dim for dim, (_, along) in enumerate(pieces) if along]
    outer = [dim for dim, (_, along) in enumerate(pieces) if not along]
    return grid.transpose(outer + inner).reshape(-1, math.prod(grid.shape[dim] for dim in inner)).tolist()
