"""Bytes on a chip: what it stores from step to step, and what a step adds. As `TrainPlan.bytes_per_rank` counts a plan.

All devices run one program, so each has buffers as large as the rank that needs most of them.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxpipe.planner import tables
from jaxpipe.planner.candidate import Candidate
from jaxpipe.planner.cost import Costs
from jaxpipe.planner.stages import Stages, groups

# Bytes per weight: float32 masters with two moments, as Adam keeps them; and the float32 sums of gradients.
MASTER, MOMENTS, GRADIENT = 4, 8, 4


class Memory:
    """Counts bytes.

    Args:
      costs: of the layers.
    """

    def __init__(self, costs: Costs):
        self.costs, self.groups = costs, groups(costs)
        self.members = Counter(self.groups)
        owners = costs.model.module.owners
        self.users = [[use for use, owner in enumerate(owners) if owner == index] for index in range(len(owners))]
        self.weights = functools.lru_cache(maxsize=4096)(self._weights)

    def _weights(
        self, size: int, boundaries: tuple[int, ...], placement: tuple[int, ...]
    ) -> tuple[float, float, float]:
        """Of a chip: how many weights it stores, with how many it computes, and bytes of the latter as a step sees them."""
        weights, ranks = self.costs.weights(size), max(placement) + 1
        rank_of = [
            placement[stage]
            for stage, (start, stop) in enumerate(zip(boundaries, boundaries[1:], strict=False))
            for _ in range(start, stop)
        ]
        stored = held = computed = 0.0
        own = np.zeros((2, ranks))
        for group, members in self.members.items():
            if group < 0:
                continue
            one = weights[group]
            if members > 1:
                homes = [rank_of[index] for index, number in enumerate(self.groups) if number == group]
                slots = max(Counter(homes).values())
                stored, held = stored + slots * one.numbers, held + slots * one.numbers
                computed += slots * one.computed
                continue
            stored += one.numbers / ranks
            homes = {rank_of[use] for use in self.users[group]}
            if len(homes) > 1 or one.cut:  # on all ranks during a step
                held, computed = held + one.numbers, computed + one.computed
            else:
                own[:, homes.pop()] += one.numbers, one.computed
        most = own.max(1)
        return float(stored), float(held + most[0]), float(computed + most[1])

    def count(
        self,
        candidate: Candidate,
        stages: Stages,
        boundaries: tuple[int, ...],
        placement: tuple[int, ...],
        live: np.ndarray,
        pending: np.ndarray,
    ) -> dict[str, float]:
        """Bytes by category.

        Args:
          live, pending: [ranks], the slots of what is saved, and of what waits between I and W.
            A step may let what is saved stay until W, where that is less, and nothing of its tail waits; then it takes less
            than is counted here.
        """
        stored, held, computed = self.weights(candidate.mesh.model, boundaries, placement)
        share = candidate.mesh.data if candidate.zero else 1
        # With one stage per rank the input of the tail lies in the slots; with more apart, in two slots or more.
        own, tails = stages.saved.copy(), max(candidate.micro_batches, 2) if candidate.schedule == "looped_bfs" else 2
        if candidate.chunks == 1:
            own[-1], tails = own[-1] + stages.tail, 0
        alike = _alike(stages.programs, placement)
        inbox = tables.inbox(candidate.schedule, candidate.mesh.pipe, candidate.micro_batches)
        batch = candidate.micro_batches * candidate.rows * self.costs.model.batch_bytes
        # The compiler for TPU lays weights out anew for derivatives; it may keep both.
        again = {"weights for derivatives": computed} if self.costs.chip.clock is not None else {}
        return {
            "weights": MASTER * stored / share,
            "optimizer": MOMENTS * stored / share,
            "gradients": GRADIENT * held,
            "weights as a step computes with them": computed,
            **again,
            "saved": _slots(own, live, alike, placement) + tails * stages.tail,
            "pending": _slots(stages.pending, pending, alike, placement),
            "messages": (inbox + 2) * stages.message,  # what was sent last, of each kind, too
            "work": stages.work,
            "batch": batch,
        }


def _alike(programs: Sequence[int], placement: Sequence[int]) -> list[int]:
    """For each stage a number that is equal for those whose slots are of one size.

    A slot of a rank has room for any of its stages, and the program of a stage finds its slots in the same way on every
    rank that runs it: so programs that meet on a rank are alike, and what is like one of them.
    """
    first = list(programs)
    for _ in first:
        by_rank: dict[int, int] = {}
        for stage, rank in enumerate(placement):
            by_rank[rank] = min(by_rank.get(rank, first[stage]), first[stage])
        by_program: dict[int, int] = {}
        for stage, rank in enumerate(placement):
            by_program[programs[stage]] = min(by_program.get(programs[stage], by_rank[rank]), by_rank[rank])
        after = [by_program[program] for program in programs]
        if after == first:
            break
        first = after
    return first


def _slots(sizes: np.ndarray, counts: np.ndarray, alike: Sequence[int], placement: Sequence[int]) -> float:
    """The most bytes that slots take: of stages that are alike, as many as any of their ranks has, for the largest one."""
    found = 0.0
    for number in set(alike):
        members = [stage for stage, other in enumerate(alike) if other == number]
        most = max(counts[placement[stage]] for stage in members)
        found = max(found, most * max(sizes[stage] for stage in members))
    return float(found)
