"""What `python -m jaxpipe plot` and `simulate` do: finds the table, reads costs, and tells what came out."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

from jaxpipe.checks import show
from jaxpipe.columns import columns
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.captions import amount
from jaxpipe.schedules.draw import draw
from jaxpipe.schedules.registry import find
from jaxpipe.schedules.simulate import SYNCS, Sync, Timeline, simulate
from jaxpipe.schedules.table import Schedule, is_path

Costs: TypeAlias = Fraction | list[Fraction]  # one for all, or one for each stage

_MOST = 1_000_000  # stages x micro-batches


@dataclass(frozen=True)
class Command:
    """The arguments of the command line.

    Attributes:
      schedule: a name, or the path of a CSV file.
      stages, micro_batches: may be missing for a file, which has its own.
      chunks: stages per rank.
      forward, backward_input, backward_weight, comm: as for `simulate`.
      memory, pending: as for `simulate`, but one number stands for that of every stage.
    """

    schedule: str
    stages: int | None
    micro_batches: int | None
    chunks: int
    forward: Costs
    backward_input: Costs
    backward_weight: Costs
    comm: Fraction
    memory: Costs | None
    pending: Costs | None

    def table(self) -> Schedule:
        """The table that is meant.

        Raises:
          ScheduleError: there is none, or it would be too large.
        """
        stages, micro_batches = self.stages, self.micro_batches
        if is_path(self.schedule):
            table = Schedule.from_csv(Path(self.schedule))
            stages = table.num_stages if stages is None else stages
            micro_batches = table.num_micro_batches if micro_batches is None else micro_batches
            return find(table, stages, micro_batches, self.chunks)
        if stages is None or micro_batches is None:
            raise ScheduleError(f"{self.schedule} needs --stages and --micro-batches; only a .csv file has its own.")
        if stages > 0 and micro_batches > 0 and stages * micro_batches > _MOST:
            raise ScheduleError(
                f"--stages {show(stages)} --micro-batches {show(micro_batches)}: the product may be at most {_MOST:,}, or "
                "the table takes too long. Use smaller ones: the picture is the same."
            )
        return find(self.schedule, stages, micro_batches, self.chunks)

    def timelines(self, *syncs: Sync) -> list[Timeline]:
        """The table in time, once for each way of waiting."""
        table = self.table()
        memory, pending = (
            [value] * table.num_stages if isinstance(value, Fraction) else value
            for value in (self.memory, self.pending)
        )
        costs = self.forward, self.backward_input, self.backward_weight, self.comm
        return [simulate(table, *costs, sync, memory=memory, pending=pending) for sync in syncs]

    def plot(self, sync: Sync, output: str | None, trace: str | None) -> Timeline | None:
        """Writes the files that are asked for. Gives back what is to be shown in the terminal, if there is no picture.

        Raises:
          ScheduleError: the suffix of a file is unknown, or it cannot be written.
        """
        (timeline,) = self.timelines(sync)
        if trace is not None and Path(trace).suffix != ".json":
            raise ScheduleError(f"--trace {show(trace)} must end in .json; pictures go to --output.")
        for path in (trace, output):
            if path is not None:
                draw(timeline, path, name=self.schedule)
        return timeline if output is None else None

    def report(self) -> str:
        """Makespan, bubble and memory as a table."""
        timelines = self.timelines(*SYNCS)
        first = timelines[0]
        lines = [
            ["sync".ljust(10), *(timeline.sync for timeline in timelines)],
            ["makespan", *(f"{float(timeline.makespan):g}" for timeline in timelines)],
            ["bubble", *(f"{float(timeline.bubble):g}" for timeline in timelines)],
            ["bubble %", *(f"{100 * timeline.bubble_fraction:.1f}" for timeline in timelines)],
        ]
        live, pending = (
            " ".join(f"{float(peak):g}" for peak in peaks) for peaks in (first.peak_live, first.peak_pending)
        )
        found = [f"{self.schedule}: {first.schedule!r}", *columns(lines, left={0})]
        found.append(f"peak live   {live}  (micro-batches, rank 0 first)")
        if first.schedule.split_backward:
            found.append(f"pending     {pending}  (those of them between I and W)")
        if first.peak_bytes is not None:
            found.append(f"peak bytes  {', '.join(amount(first, peak) for peak in first.peak_bytes)}")
        return "\n".join(found)


def read_cost(text: str) -> Fraction:
    """Reads a cost as an exact number: `1.1` and `11/10` are the same. With floats, 31.900000000000002 would be printed.

    Raises:
      ScheduleError: it is no number, or one that nobody can mean.
    """
    try:
        # Not `1e9999999`: it would be exact too, but takes minutes to make. `simulate` refuses other numbers out of range.
        return Fraction("inf" if len(text) > 100 or re.search(r"e[+-]?\d{4}", text, re.IGNORECASE) else text)
    except (ValueError, ZeroDivisionError):
        raise ScheduleError(f"{show(text)} is not a number in range; write 2, 1.1 or 11/10") from None


def read_costs(text: str) -> Costs:
    """Reads one number for all stages, or one for each of them with commas between.

    Raises:
      ScheduleError: as `read_cost`.
    """
    return [read_cost(part) for part in text.split(",")] if "," in text else read_cost(text)
