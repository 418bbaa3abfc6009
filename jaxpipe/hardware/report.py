"""`Report`: what a compiler says about a step, as numbers and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpipe.columns import columns, ranges, short
from jaxpipe.hardware.chips import Chip
from jaxpipe.hardware.collectives import Collective
from jaxpipe.hardware.copies import Copy
from jaxpipe.hardware.structure import Op


class OpCost(NamedTuple):
    """What one run of an op costs on a device.

    Attributes:
      op: the kind, "F" or "B", and the number of the stage program.
      stages: those that run this program.
      flops: of its products, recomputation and tail included; `tail_flops` of them are the tail's.
      cycles: as the TPU compiler estimates, and those of the tail in it; 0 where it does not.
    """

    op: Op
    stages: tuple[int, ...]
    flops: int
    tail_flops: int
    cycles: int
    tail_cycles: int


@dataclass(frozen=True)
class Report:
    """What the compiler says about a training step (or an evaluation of M micro-batches).

    Attributes:
      mesh: the sizes of the mesh axes.
      device: the kind of device, as JAX calls it.
      chip: what its maker publishes; None for one that is not known, such as a CPU.
      evaluation: whether it is an evaluation.
      bytes_per_device: "weights", "optimizer" and, where layers have it, "layer state", which stay; "gradients" (the sums)
        and "saved" (what forwards keep for backwards), as planned; "temporary", everything else that the compiler allocates
        for the time of a step, the batch and the program included; and "total", the sum.
      planned: what is expected, in bytes on a device: weights that a rank computes with, gradients, what is saved,
        messages, and the "work" of the op that makes most at once, before a compiler fuses anything. {} for an evaluation.
      flops: of one device in one step, on average over the devices: products and convolutions, recomputation included.
      useful_flops: the same without what is computed a second time.
      collectives: tuples (kind, bytes, count, asynchronous, where), those in the ticks first.
      cycles: by part of the step, each of the rank that has most of it, per step: "forward", "backward" (recomputation
        included), "tail" (the layers behind the last unit, loss, and their backward), "loop" (between the branches of the
        ticks) and "optimizer" (everything before and after the ticks). {} if the compiler estimates none, which is all but
        that for TPU.
      ops: what one run of each op costs.
      copies: those in the ticks, the largest first.
      times: seconds of a step on the rank that works longest, by what it does, "waiting" included; {} without cycles.
      ticks: of the schedule.
      text: the optimized program, as HLO.
    """

    mesh: Mapping[str, int]
    device: str
    chip: Chip | None
    evaluation: bool
    bytes_per_device: Mapping[str, int]
    planned: Mapping[str, int]
    flops: float
    useful_flops: float
    collectives: Sequence[Collective]
    cycles: Mapping[str, int]
    ops: Sequence[OpCost]
    copies: Sequence[Copy]
    times: Mapping[str, float]
    ticks: int
    text: str = field(repr=False)

    @property
    def step_seconds(self) -> float | None:
        """The predicted time of a step; None without cycles."""
        return sum(self.times.values()) if self.times else None

    @property
    def utilisation(self) -> float | None:
        """Useful operations over what the chip could do in the predicted time, 0 to 1; None without cycles."""
        if self.step_seconds is None or self.chip is None:
            return None
        return self.useful_flops / (self.step_seconds * self.chip.peak_flops)

    @property
    def loop_overhead(self) -> float | None:
        """Cycles between the branches of a tick over those of an average op, on the rank that works longest."""
        if not self.cycles:
            return None
        return self.cycles["loop"] / self._work

    @property
    def _work(self) -> float:
        """Cycles of all ops of the rank that works longest."""
        assert self.chip is not None and self.chip.clock is not None
        return sum(self.times[part] for part in ("forward", "backward", "tail")) * self.chip.clock

    def __str__(self) -> str:
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        what = "an evaluation" if self.evaluation else "a training step"
        lines = [f"{what} on {self.device}, {shape}, {self.ticks} ticks", ""]
        lines += columns(_rows(self.bytes_per_device, "bytes on a device"), left={0})
        again = self.flops - self.useful_flops
        lines += ["", f"FLOPs of a device: {short(self.flops)}, of which {short(again)} are computed a second time"]
        lines += ["", *columns(_collectives(self.collectives), left={0, 3, 4})]
        if self.copies:
            lines += ["", *columns(_copies(self.copies), left={0, 1, 5})]
        lines += ["", *columns(_ops(self.ops), left={0, 1})]
        if self.times:
            lines += ["", *self._times()]
        elif self.chip is not None:
            least = self.useful_flops / self.chip.peak_flops
            lines += ["", f"at the published peak of {self.chip.name} the products alone take {_time(least)}"]
        return "\n".join(lines)

    def _times(self) -> list[str]:
        seconds, chip = self.step_seconds, self.chip
        assert seconds is not None and chip is not None and chip.clock is not None
        rows = [["predicted, the rank that works longest", "seconds", ""]]
        rows += [[name, f"{time:.6f}", f"{100 * time / seconds:.1f} %"] for name, time in self.times.items()]
        rows.append(["step", f"{seconds:.6f}", ""])
        peak = f"{chip.clock / 1e6:,.0f} MHz and {short(chip.peak_flops)}FLOP/s of {chip.name}"
        return [*columns(rows, left={0}), f"utilisation {100 * (self.utilisation or 0):.1f} %, at {peak}"]


def _rows(values: Mapping[str, int], title: str) -> list[list[str]]:
    return [[title, ""], *([name, short(size, "B")] for name, size in values.items())]


def _collectives(found: Sequence[Collective]) -> list[list[str]]:
    rows = [["collectives of a step", "bytes", "count", "", "where"]]
    for one in found:
        beside = "with work beside" if one.asynchronous else "alone"
        rows.append([one.kind, short(one.bytes, "B"), str(one.count), beside, one.where])
    return rows if len(rows) > 1 else [[*rows[0][:-1], "none"]]


def _copies(found: Sequence[Copy]) -> list[list[str]]:
    rows = [["copies in the ticks", "", "bytes", "count", "cycles", "where"]]
    rows += [[c.what, c.shape, short(c.bytes, "B"), str(c.count), f"{c.cycles:,}", c.part] for c in found[:12]]
    rest = found[12:]
    if rest:
        many = sum(copy.count for copy in rest)
        rows.append([f"{len(rest)} smaller ones", "", short(max(copy.bytes for copy in rest), "B"), str(many), "", ""])
    return rows


def _ops(found: Sequence[OpCost]) -> list[list[str]]:
    rows = [["one run of an op", "stages", "FLOPs", "cycles", "of the tail"]]
    for one in found:
        cells = [short(one.flops), f"{one.cycles:,}", f"{one.tail_cycles:,}"]
        rows.append([one.op.kind, ranges(one.stages), *cells])
    return rows


def _time(seconds: float) -> str:
    return short(seconds, "s") if seconds >= 1 else f"{1000 * seconds:.2f} ms"
