"""The search: best first, by bounds. What is left out has a bound above everything that was found, so it cannot be better.

Meshes are opened in the order of what no schedule on them could stay below; their candidates then have bounds of their own,
from the stages; and the best of those are walked through, tick by tick. What comes out first is the best there is.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
        self.rejected: list[tuple[float, Candidate]] = []  # bounds of what does not fit

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
        """The best that fit, best first, at most one for each mesh and schedule."""
        order = itertools.count()
        heap: list[tuple[float, float, int, Mesh | Candidate | Found]] = []
        for mesh in self.meshes(self.chips, self.sizes):
            if self.least_bytes(mesh) <= self.memory:
                heapq.heappush(heap, (self.least_seconds(mesh), 0, next(order), mesh))
        found: list[Found] = []
        seen: set[tuple[Mesh, str]] = set()
        while heap and len(found) < count:
            bound, _, _, node = heapq.heappop(heap)
            if isinstance(node, Found):
                seen.add((node.candidate.mesh, node.candidate.schedule))
                found.append(node)
                # Others of this mesh and schedule are not better, so they are not looked at again.
            elif isinstance(node, Mesh):
                for candidate in self.candidates(node):
                    below = max(self.steps.bound(candidate), bound)
                    if self.steps.least_bytes(candidate) > self.memory:
                        self.rejected.append((below, candidate))
                    else:
                        heapq.heappush(heap, (below, 0, next(order), candidate))
            elif (node.mesh, node.schedule) not in seen:
                step = self.step(node)
                if step is not None and step.total_bytes <= self.memory:
                    heapq.heappush(heap, (step.seconds, step.total_bytes, next(order), Found(node, step)))
                elif step is not None:
                    self.rejected.append((step.seconds, node))
            while heap and isinstance(heap[0][3], Found) and _group(heap[0][3]) in seen:
                heapq.heappop(heap)
        return found

    def step(self, candidate: Candidate) -> Step | None:
        """The step of a candidate; None where its schedule has no such table."""
        try:
            return self.steps.step(candidate)
        except ScheduleError:
            return None

    def candidates(self, mesh: Mesh) -> Iterator[Candidate]:
        """All ways to train on a mesh."""
        per_rank = self.global_batch // mesh.data
        for name, chunks in self._tables(mesh.pipe):
            try:
                self.steps.cutter.boundaries(mesh.pipe * chunks, "layer", mesh.model)
            except PartitionError:
                continue
            for rows in _divisors(per_rank):
                micro_batches = per_rank // rows
                if name in _ROUND and micro_batches % mesh.pipe:
                    continue
                for remat, zero in itertools.product(REMATS, (0, 1) if mesh.data > 1 else (0,)):
                    yield Candidate(mesh, name, chunks, micro_batches, rows, remat, zero)

    def _tables(self, pipe: int) -> list[tuple[str, int]]:
        if pipe == 1:
            return [("1f1b", 1)]
        layers = self.costs.num_layers
        return [(name, v) for name, several in self.schedules.items() for v in several if pipe * v <= layers]

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

    # ----------------------------------------------------------------------------------------------- what does not fit

    def faster_that_do_not_fit(self, count: int, than: float) -> list[Found]:
        """Of what does not fit, the fastest, if faster than what does; one for each mesh and schedule."""
        found: list[Found] = []
        seen: set[tuple[Mesh, str]] = set()
        for bound, candidate in sorted(self.rejected, key=lambda pair: pair[0]):
            if bound >= than or len(found) == count:
                break
            if (candidate.mesh, candidate.schedule) in seen:
                continue
            step = self.step(candidate)
            if step is not None and step.seconds < than:
                seen.add((candidate.mesh, candidate.schedule))
                found.append(Found(candidate, step))
        return found

    def nearest(self, count: int) -> list[Found]:
        """Where nothing fits: what needs least, one for each mesh."""
        meshes = sorted(self.meshes(self.chips, self.sizes), key=lambda mesh: (self.least_bytes(mesh), mesh))[: 4 * count]
        found: list[Found] = []
        for mesh in meshes:
            some = [one for one in self.candidates(mesh) if one.schedule == "1f1b" and one.rows == 1]
            made = [Found(one, step) for one in some if (step := self.step(one)) is not None]
            if made:
                found.append(min(made, key=lambda one: one.step.total_bytes))
        return sorted(found, key=lambda one: one.step.total_bytes)[:count]

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


def _group(found: Found) -> tuple[Mesh, str]:
    return found.candidate.mesh, found.candidate.schedule


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
