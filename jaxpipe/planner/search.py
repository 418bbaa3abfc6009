"""The search: best first, by bounds. What is left out has a bound above everything that was found, so it cannot be better.

Meshes are opened in the order of what no schedule on them could stay below; their candidates then have bounds of their own,
from the stages; and the best of those are walked through, tick by tick. What comes out first is the best there is.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from jaxpipe.errors import PartitionError, ScheduleError, ShardingError
from jaxpipe.planner import tables
from jaxpipe.planner.candidate import Candidate, Mesh
from jaxpipe.planner.cost import MODEL
from jaxpipe.planner.memory import GRADIENT, MASTER, MOMENTS
from jaxpipe.planner.step import Step, Steps
from jaxpipe.planner.trace import KEEPS

REMATS = ("none", "dots", "layer", "stage")
# Schedules whose rounds are of as many micro-batches as there are ranks; others take any number.
_ROUND = ("interleaved", "interleaved_zero_bubble")
# Of what does not fit, how much is looked at: it is there to compare with.
_LOOKED_AT = 20
# Data ranks, devices that share a layer, schedule.
Group: TypeAlias = tuple[int, int, str]


class Cut(NamedTuple):
    """How layers and rows are cut; the fields are those of a candidate."""

    mesh: Mesh
    chunks: int
    rows: int
    remat: str

    @property
    def keeps(self) -> str:
        """What layers keep; see `trace.KEEPS`."""
        return "layer" if self.remat == "stage" else self.remat


class Found(NamedTuple):
    """A candidate and its step."""

    candidate: Candidate
    step: Step


class Search:
    """Searches what fits on some chips.

    Args:
      steps: predicts.
      chips: how many there are.
      global_batch: rows of a step, over all micro-batches and data ranks.
    """

    def __init__(self, steps: Steps, chips: int, global_batch: int):
        self.steps, self.chips, self.global_batch = steps, chips, global_batch
        self.costs, self.memory = steps.costs, steps.chip.memory
        self.schedules = tables.schedules()
        self.sizes = [size for size in _divisors(chips) if self._cuts(size)]
        # What does not fit, with bounds of its seconds, and what was not even looked at for that reason.
        self.rejected: list[tuple[float, Candidate]] = []
        self.rejected_cuts: list[Cut] = []

    def _cuts(self, size: int) -> bool:
        """Whether the axis "model" may have so many devices."""
        if size == 1:
            return True
        if MODEL not in self.costs.model.module.axis_rules.axes:
            return False
        try:
            return any(weights.cut for weights in self.costs.weights(size))
        except ShardingError:
            return False

    def meshes(self, chips: int, sizes: Sequence[int]) -> list[Mesh]:
        """All meshes of at most so many chips."""
        datas = _divisors(self.global_batch)
        return [
            Mesh(pipe, data, size)
            for size in sizes
            for pipe in range(1, min(self.costs.num_layers, chips // size) + 1)
            for data in datas
            if pipe * data * size <= chips
        ]

    def best(self, count: int) -> list[Found]:
        """The best that fit, best first, at most one for each number of data ranks, cut of layers, and schedule."""
        order = itertools.count()
        heap: list[tuple[float, float, int, Mesh | Cut | Candidate | Found]] = []

        def push(bound: float, node: Mesh | Cut | Candidate | Found, size: float = 0.0) -> None:
            heapq.heappush(heap, (bound, size, next(order), node))

        for mesh in self.meshes(self.chips, self.sizes):
            if self.least_bytes(mesh) <= self.memory:
                push(self.least_seconds(mesh), mesh)
        found: list[Found] = []
        seen: set[Group] = set()
        while heap and len(found) < count:
            bound, _, _, node = heapq.heappop(heap)
            if isinstance(node, Mesh):
                for cut in self.cuts(node):
                    push(max(bound, self.least_seconds_of_cut(cut)), cut)
            elif isinstance(node, Cut):
                for candidate in self.candidates(node):
                    if _group(candidate) in seen:
                        continue
                    below = max(bound, self.steps.bound(candidate))
                    if self.steps.least_bytes(candidate) > self.memory:
                        self.rejected.append((below, candidate))
                    else:
                        push(below, candidate)
            elif isinstance(node, Candidate):
                step = None if _group(node) in seen else self.step(node)
                if step is not None and step.total_bytes <= self.memory:
                    push(step.seconds, Found(node, step), step.total_bytes)
                elif step is not None:
                    self.rejected.append((step.seconds, node))
            elif _group(node.candidate) not in seen:
                seen.add(_group(node.candidate))
                found.append(node)
        return found

    def step(self, candidate: Candidate) -> Step | None:
        """The step of a candidate; None where its schedule has no such table."""
        try:
            return self.steps.step(candidate)
        except ScheduleError:
            return None

    def cuts(self, mesh: Mesh) -> Iterator[Cut]:
        """All ways to cut the layers and the rows on a mesh, but for those that cannot fit, whatever the schedule."""
        per_rank = self.global_batch // mesh.data
        names = {"1f1b": (1,)} if mesh.pipe == 1 else self.schedules
        for chunks in sorted({v for several in names.values() for v in several}):
            if not self._can_cut(mesh, chunks):
                continue
            for rows, remat in itertools.product(_divisors(per_rank), REMATS):
                cut = Cut(mesh, chunks, rows, remat)
                if self.least_bytes_of_cut(cut) <= self.memory:
                    yield cut
                else:
                    self.rejected_cuts.append(cut)

    def _can_cut(self, mesh: Mesh, chunks: int) -> bool:
        if mesh.pipe * chunks > self.costs.num_layers:
            return False
        if self.costs.model.module.partition_method is None:
            return True
        try:
            self.steps.cutter.boundaries(mesh.pipe * chunks, "layer", mesh.model)
        except PartitionError:
            return False
        return True

    def candidates(self, cut: Cut) -> Iterator[Candidate]:
        """All ways to train with a cut."""
        mesh, chunks, rows, remat = cut
        micro_batches = self.global_batch // mesh.data // rows
        names = {"1f1b": (1,)} if mesh.pipe == 1 else self.schedules
        for name, several in names.items():
            if chunks not in several or (name in _ROUND and micro_batches % mesh.pipe):
                continue
            if remat == "stage" and tables.is_split(name):
                continue  # what waits between the halves of a whole stage is not counted
            for zero in (0, 1) if mesh.data > 1 else (0,):
                yield Candidate(mesh, name, chunks, micro_batches, rows, remat, zero)

    # ------------------------------------------------------------------------------------------------------- bounds

    def least_seconds(self, mesh: Mesh) -> float:
        """Seconds that nothing on a mesh stays below: its work, cut evenly."""
        per_rank, least = self.global_batch // mesh.data, float("inf")
        for rows, keeps in itertools.product(_divisors(per_rank), KEEPS):
            total, heaviest = self.steps.cutter.total(keeps, rows, mesh.model)
            least = min(least, max(total / mesh.pipe, heaviest) * (per_rank // rows))
        weights = self.costs.weights(mesh.model)
        numbers, computed = (sum(column) / mesh.pipe for column in list(zip(*weights, strict=True))[:2])
        around = (self.steps.around_of(mesh, zero, numbers, numbers, computed) for zero in (0, 1))
        return least + min(map(sum, around))

    def least_bytes(self, mesh: Mesh) -> float:
        """Bytes that nothing on a mesh stays below: its weights, cut evenly."""
        numbers = sum(one.numbers for one in self.costs.weights(mesh.model))
        return ((MASTER + MOMENTS) / mesh.data + GRADIENT) * numbers / mesh.pipe

    def least_seconds_of_cut(self, cut: Cut) -> float:
        """The same for a cut."""
        mesh, _, rows, _ = cut
        total, heaviest = self.steps.cutter.total(cut.keeps, rows, mesh.model)
        return max(total / mesh.pipe, heaviest) * (self.global_batch // mesh.data // rows)

    def least_bytes_of_cut(self, cut: Cut) -> float:
        """Bytes that no schedule with a cut stays below: its weights and what layers save, cut evenly, and their work.

        Rank r keeps what min(M, p - r) micro-batches save where it has one stage, whatever the schedule; and if no rank may
        keep more than X, all stages together save at most X times the sum of 1 / min(M, p - r).
        """
        mesh, chunks, rows, remat = cut
        saved, work = self.steps.cutter.least(cut.keeps, rows, mesh.model)
        micro_batches = self.global_batch // mesh.data // rows
        live = float(mesh.pipe * chunks)
        if chunks == 1:
            live = sum(1 / min(micro_batches, mesh.pipe - rank) for rank in range(mesh.pipe))
        return self.least_bytes(mesh) + (0.0 if remat == "stage" else saved / live) + work

    # ----------------------------------------------------------------------------------------------- what does not fit

    def faster_that_do_not_fit(self, count: int, than: float) -> list[Found]:
        """Some of what does not fit and would be faster than what does, at most one of each group."""
        for cut in sorted(self.rejected_cuts, key=self.least_seconds_of_cut)[:_LOOKED_AT]:
            if self.least_seconds_of_cut(cut) < than:
                self.rejected += [(self.steps.bound(candidate), candidate) for candidate in self.candidates(cut)]
        found: dict[Group, Found] = {}
        for bound, candidate in sorted(self.rejected)[:_LOOKED_AT]:
            if bound >= than or len(found) == count:
                break
            step = None if _group(candidate) in found else self.step(candidate)
            if step is not None and step.seconds < than:
                found[_group(candidate)] = Found(candidate, step)
        return sorted(found.values(), key=lambda one: one.step.seconds)

    def nearest(self, count: int) -> list[Found]:
        """Where nothing fits: what needs least, one for each number of data ranks and cut of layers."""
        found: dict[tuple[int, int], tuple[float, Candidate]] = {}
        for mesh in self.meshes(self.chips, self.sizes):
            cuts = [Cut(mesh, 1, 1, remat) for remat in REMATS] if self._can_cut(mesh, 1) else []
            for candidate in (one for cut in cuts for one in self.candidates(cut) if one.schedule == "1f1b"):
                seen = found.get((mesh.data, mesh.model), (float("inf"), candidate))
                if self.least_bytes_of_cut(_cut_of(candidate)) < seen[0]:  # else it cannot be nearer
                    found[mesh.data, mesh.model] = min(seen, (self.steps.least_bytes(candidate), candidate))
        chosen = sorted(found.values())[:count]
        return [Found(candidate, self.steps.step(candidate)) for _, candidate in chosen]

    def smallest(self) -> Found | None:
        """The fewest chips on which the model fits; None if it fits on no number of chips."""
        sizes = [1] + [size for size in (2, 4, 8, 16, 32, 64, 128) if self._cuts(size)]
        everything = self.costs.num_layers * max(sizes) * self.global_batch
        for mesh in sorted(self.meshes(everything, sizes), key=lambda mesh: (mesh.size, mesh)):
            if self.least_bytes(mesh) > self.memory:
                continue
            zero, micro_batches = int(mesh.data > 1), self.global_batch // mesh.data
            for remat in REMATS:
                candidate = Candidate(mesh, "1f1b", 1, micro_batches, 1, remat, zero)
                try:
                    fits = self.steps.least_bytes(candidate) <= self.memory
                except PartitionError:
                    break
                if fits:
                    return Found(candidate, self.steps.step(candidate))
        return None


def _cut_of(candidate: Candidate) -> Cut:
    return Cut(candidate.mesh, candidate.chunks, candidate.rows, candidate.remat)


def _group(candidate: Candidate) -> Group:
    """Of those that differ in the number of ranks only, the best counts: it uses as many chips as there are."""
    return candidate.mesh.data, candidate.mesh.model, candidate.schedule


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
