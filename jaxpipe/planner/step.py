"""The step of a candidate: seconds, bytes, and what they are made of."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxpipe.planner import tables
from jaxpipe.planner.candidate import Candidate, Mesh
from jaxpipe.planner.cost import Costs
from jaxpipe.planner.links import scatter, send
from jaxpipe.planner.memory import GRADIENT, MASTER, MOMENTS, Memory
from jaxpipe.planner.stages import Cutter, Stages
from jaxpipe.planner.tables import placement
from jaxpipe.planner.walk import Walk, lower_bound, walk


class Around(NamedTuple):
    """Seconds before and behind the ticks: sums over the data ranks, and the optimizer."""

    link: float
    optimizer: float


class Step(NamedTuple):
    """What is known of a candidate.

    Attributes:
      seconds: of a step.
      parts: of them, on the rank that works longest: "compute", "memory", "link", "optimizer" and "bubble".
      bubble: the part of the ticks in which ranks wait, on average, 0 to 1.
      bytes: of a chip, by category.
      boundaries: of the stages.
    """

    seconds: float
    parts: Mapping[str, float]
    bubble: float
    bytes: Mapping[str, float]
    boundaries: tuple[int, ...]

    @property
    def total_bytes(self) -> float:
        """Of a chip."""
        return sum(self.bytes.values())


class Steps:
    """Predicts steps.

    Args:
      costs: of the layers on a chip.
    """

    def __init__(self, costs: Costs):
        self.costs, self.chip = costs, costs.chip
        self.cutter, self.memory = Cutter(costs), Memory(costs)
        self._cut = functools.lru_cache(maxsize=4096)(self._cut_for)
        self._walked = functools.lru_cache(maxsize=4096)(self._walk)

    def _cut_for(self, candidate: Candidate) -> tuple[tuple[int, ...], Stages]:
        boundaries = self.cutter.boundaries(candidate.num_stages, candidate.keeps, candidate.mesh.model)
        return boundaries, self.cutter.stages(candidate, boundaries)

    def cut(self, candidate: Candidate) -> tuple[tuple[int, ...], Stages]:
        """Boundaries and stages; they do not depend on the data ranks, on the schedule, and on M."""
        mesh = candidate.mesh._replace(data=1)
        return self._cut(candidate._replace(mesh=mesh, schedule="", micro_batches=1, zero=0))

    def around(self, candidate: Candidate) -> Around:
        """What comes before and behind the ticks."""
        boundaries, _ = self.cut(candidate)
        where = placement(candidate.schedule, candidate.mesh.pipe, candidate.chunks)
        return self.around_of(
            candidate.mesh, candidate.zero, *self.memory.weights(candidate.mesh.model, boundaries, where)
        )

    def around_of(self, mesh: Mesh, zero: int, stored: float, held: float, computed: float) -> Around:
        """The same for so many weights of a chip, stored and as it computes with them, and bytes of the latter."""
        share = mesh.data if zero else 1
        # Adam reads weight, gradient and moments, and writes all but the gradient.
        passed = (2 * (MASTER + MOMENTS) + GRADIENT) * stored / share
        sums = GRADIENT * held + computed if zero else 2 * GRADIENT * held
        return Around(sums * scatter(self.chip, mesh.data, mesh.model), passed / self.chip.bandwidth)

    def bound(self, candidate: Candidate) -> float:
        """Seconds that its step cannot stay below, told without its table."""
        _, stages = self.cut(candidate)
        shape = candidate.schedule, candidate.mesh.pipe, candidate.chunks, candidate.micro_batches
        return lower_bound(*shape, stages.ops, self.comm(candidate, stages)) + sum(self.around(candidate))

    def comm(self, candidate: Candidate, stages: Stages) -> np.ndarray:
        """Seconds of a value between stages, [stages - 1]."""
        where = placement(candidate.schedule, candidate.mesh.pipe, candidate.chunks)
        return stages.message * send(self.chip, where, candidate.mesh.data * candidate.mesh.model)

    def bytes(self, candidate: Candidate, live: np.ndarray, pending: np.ndarray) -> dict[str, float]:
        """Bytes of a chip by category."""
        boundaries, stages = self.cut(candidate)
        where = placement(candidate.schedule, candidate.mesh.pipe, candidate.chunks)
        return self.memory.count(candidate, stages, boundaries, where, live, pending)

    def least_bytes(self, candidate: Candidate) -> float:
        """Bytes that the candidate needs at least, told without its table."""
        shape = candidate.schedule, candidate.mesh.pipe, candidate.chunks, candidate.micro_batches
        return sum(self.bytes(candidate, *tables.kept_at_least(*shape)).values())

    def _walk(self, candidate: Candidate) -> Walk:
        """The ticks, which do not depend on how weights are stored."""
        _, stages = self.cut(candidate)
        shape = candidate.schedule, candidate.mesh.pipe, candidate.chunks, candidate.micro_batches
        # Tables that split the backward get other ticks than they are written in, so that ranks hardly wait for each other.
        joined = not tables.is_split(candidate.schedule)
        return walk(*shape, stages.ops, self.comm(candidate, stages), joined)

    def step(self, candidate: Candidate) -> Step:
        """The prediction, by the table of the schedule."""
        boundaries, stages = self.cut(candidate)
        shape = candidate.schedule, candidate.mesh.pipe, candidate.chunks, candidate.micro_batches
        where = placement(*shape[:3])
        walked, around = self._walked(candidate._replace(zero=0)), self.around(candidate)
        by_rank = np.stack([np.bincount(where, kind, candidate.mesh.pipe) for kind in stages.kinds.T])
        compute, memory, link = by_rank[:, int(np.argmax(by_rank.sum(0)))] * candidate.micro_batches
        parts = {
            "compute": compute,
            "memory": memory,
            "link": link + around.link,
            "optimizer": around.optimizer,
            "bubble": max(walked.makespan - compute - memory - link, 0.0),
        }
        found = self.bytes(candidate, *tables.kept(*shape))
        seconds = walked.makespan + sum(around)
        return Step(seconds, {name: float(part) for name, part in parts.items()}, walked.bubble, found, boundaries)
