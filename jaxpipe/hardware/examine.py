"""Makes the report of a compiled step: joins what its text says with how often the program runs what."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from jaxpipe.executor.eval_plan import EvalPlan
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.hardware import hlo
from jaxpipe.hardware.chips import chip_of
from jaxpipe.hardware.collectives import Collective
from jaxpipe.hardware.collectives import find as find_collectives
from jaxpipe.hardware.copies import Copy, Known
from jaxpipe.hardware.copies import find as find_copies
from jaxpipe.hardware.flops import Flops
from jaxpipe.hardware.report import OpCost, Report
from jaxpipe.hardware.seconds import Costs, estimate
from jaxpipe.hardware.steptime import runs
from jaxpipe.hardware.structure import BACKWARD, FORWARD, LOOP, OUTSIDE, TAIL, Block, Op, blocks
from jaxpipe.lowering.program import Cell
from jaxpipe.mesh import DATA, PIPE

LAYER_STATE = "layer state"  # the name of a kind of bytes that most models have none of
Like = TypeVar("Like", Collective, Copy)


def examine(
    compiled: jax.stages.Compiled,
    plan: TrainPlan | EvalPlan,
    *,
    kept: Mapping[str, int],
    planned: Mapping[str, int],
    known: Known,
    counted: Flops,
    evaluation: bool = False,
) -> Report:
    """Makes the report.

    Args:
      kept: bytes on a device of weights, optimizer state and layer state, which stay from step to step.
      planned: as in the report.
      known: what arrays are, by shape.
      counted: the operations of a rank and a data rank.
    """
    text = compiled.as_text()
    assert text is not None, "a compiled step has a text"
    look = _Look(hlo.parse(text), plan)
    mesh, program = plan.mesh, plan.program
    shared = mesh.size // (mesh.shape[PIPE] * mesh.shape.get(DATA, 1))  # devices that share the work of a rank
    ops = look.ops(counted, shared)
    turns = plan.num_micro_batches / program.num_ranks  # of a tail that all ranks share, a micro-batch each
    around = (counted.outside + counted.shared_tail * turns) / shared
    flops = [around + sum(cost.flops * own.get(cost.op, 0) for cost in ops) for own in look.runs]
    chip = chip_of(mesh.devices.flat[0].device_kind)
    costs = Costs(
        ops={cost.op: cost.cycles for cost in ops},
        tails={cost.op: cost.tail_cycles for cost in ops},
        tick=look.cycles_per_tick(),
        shared_tail=look.cycles_of_shared_tail(),
        outside=look.cycles(lambda block: block.op is None and block.loop < 0),
        collectives=look.collectives(),
        inside={cost.op: look.collectives_of(cost.op) for cost in ops},
    )
    timed = chip is not None and chip.clock is not None and any(costs.ops.values())
    return Report(
        mesh=dict(mesh.shape),
        device=mesh.devices.flat[0].device_kind,
        chip=chip,
        evaluation=evaluation,
        bytes_per_device=_bytes(compiled.memory_analysis(), kept, planned),
        planned=dict(planned),
        flops=sum(flops) / len(flops),
        useful_flops=_useful(ops, look, evaluation) / len(flops) + counted.shared_tail * turns / shared,
        collectives=costs.collectives,
        cycles=_cycles(ops, look, costs) if timed else {},
        ops=ops,
        copies=look.copies(known),
        times=estimate(program, look.op_of, costs, chip) if timed and chip is not None else {},
        ticks=program.num_ticks,
        text=text,
    )


class _Look:
    """A compiled program beside the one that it was made of."""

    def __init__(self, module: hlo.Module, plan: TrainPlan | EvalPlan):
        self.module, self.plan, self.program = module, plan, plan.program
        self.blocks = blocks(module)
        self.runs = runs(self.program, self.op_of)
        self._branches: Counter[Op] = Counter()
        for op in {block.branch: block.op for block in self.blocks if block.op is not None}.values():
            self._branches[op] += 1

    def op_of(self, cell: Cell) -> Op:
        """What the branch of a cell runs."""
        return Op(cell.kind, self.plan.program_ids[cell.stage])

    def iterations(self, block: Block) -> int:
        """How often the loop over ticks runs that a block is in."""
        if block.iterations is not None:
            return block.iterations
        loops = self.program.loops
        return loops[min(block.loop, len(loops) - 1)].num_iterations

    def often(self, block: Block) -> np.ndarray:
        """[ranks] How often a block is run in a step. Branches of one op share its runs."""
        if block.op is not None:
            runs = [own.get(block.op, 0) for own in self.runs]
            return block.times * np.asarray(runs) / self._branches[block.op]
        times = block.times * (self.iterations(block) if block.loop >= 0 else 1)
        return np.full(self.program.num_ranks, times, float)

    def _together(self, find: Callable[[Block], list[Like]]) -> list[Like]:
        """Like things that were found, as one with their number on the rank that has most of them."""
        found: dict[Like, np.ndarray] = {}
        for block in self.blocks:
            for one in find(block):
                found[one] = found.get(one, 0) + self.often(block)
        return [one._replace(count=max(round(float(count.max())), 1)) for one, count in found.items()]

    def cycles(self, chosen: Callable[[Block], bool], part: str | None = None) -> float:
        """Cycles of a step in some blocks, each run as often as `times` says."""
        return sum(
            instruction.cycles * block.times
            for block in self.blocks
            if chosen(block)
            for instruction in block.computation
            if part is None or block.part(instruction) == part
        )

    def cycles_per_tick(self) -> float:
        """Cycles between the branches, on average over the ticks."""
        return self._between(LOOP) / self.program.num_ticks

    def cycles_of_shared_tail(self) -> float:
        """Cycles of a step in a tail that all ranks run between the ticks."""
        return self._between(TAIL)

    def _between(self, part: str) -> float:
        return sum(
            instruction.cycles * float(self.often(block)[0])
            for block in self.blocks
            if block.op is None and block.loop >= 0
            for instruction in block.computation
            if block.part(instruction) == part
        )

    def ops(self, counted: Flops, shared: int) -> list["OpCost"]:
        """What one run of each op costs."""
        found: list[OpCost] = []
        for op in sorted({op for own in self.runs for op in own}):
            copies_of = max(self._branches[op], 1)
            cycles = self.cycles(lambda block, op=op: block.op == op) / copies_of
            tail = self.cycles(lambda block, op=op: block.op == op, TAIL) / copies_of
            stages = [s for s, own in enumerate(self.plan.program_ids) if own == op.program]
            flops = counted.ops.get(op, 0) // shared, counted.tail.get(op, 0) // shared
            found.append(OpCost(op, tuple(stages), *flops, round(cycles), round(tail)))
        return found

    def collectives(self) -> list[Collective]:
        """Like collectives together, those of the ticks first."""
        made = self._together(lambda block: find_collectives(self.module, block, self.plan.mesh))
        order = (LOOP, FORWARD, BACKWARD, TAIL, OUTSIDE)
        return sorted(made, key=lambda one: (order.index(one.part), -one.bytes * one.count))

    def collectives_of(self, op: Op) -> list[Collective]:
        """Those of one run of an op; of several branches that run it, on average."""
        found: Counter[Collective] = Counter()
        for block in self.blocks:
            if block.op == op:
                for one in find_collectives(self.module, block, self.plan.mesh):
                    found[one] += block.times
        return [one._replace(count=max(round(n / self._branches[op]), 1)) for one, n in found.items()]

    def copies(self, known: Known) -> list[Copy]:
        """Like copies in the ticks together, the largest first."""
        return sorted(self._together(lambda block: find_copies(self.module, block, known)), key=lambda one: -one.bytes)


def _bytes(memory: Any, kept: Mapping[str, int], planned: Mapping[str, int]) -> dict[str, int]:
    """Bytes on a device by kind; what the compiler allocates beyond the others is "temporary"."""
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    named = {
        "weights": kept["weights"],
        "optimizer": kept.get("optimizer", 0),
        "gradients": planned.get("gradients", 0),
        "saved": planned.get("saved", 0),
        **{name: size for name, size in kept.items() if name == LAYER_STATE},
    }
    return named | {"temporary": max(total - sum(named.values()), 0), "total": total}


def _useful(ops: list[OpCost], look: _Look, evaluation: bool) -> float:
    """The operations of all ranks without what is computed twice: of a backward, twice those of its forward."""
    total = 0.0
    for own in look.runs:
        for cost in ops:
            body = 0 if cost.op.kind != "F" else cost.flops - cost.tail_flops
            times = 1 if evaluation else 3
            total += own.get(cost.op, 0) * (times * body + cost.tail_flops)
    return total


def _cycles(ops: list[OpCost], look: _Look, costs: Costs) -> dict[str, int]:
    """Cycles of a step by part, each of the rank that has most of it."""

    def most(cost_of: Callable[[OpCost], int]) -> int:
        return max(sum(cost_of(cost) * own.get(cost.op, 0) for cost in ops) for own in look.runs)

    return {
        FORWARD: most(lambda cost: (cost.cycles - cost.tail_cycles) * (cost.op.kind == "F")),
        BACKWARD: most(lambda cost: (cost.cycles - cost.tail_cycles) * (cost.op.kind != "F")),
        TAIL: most(lambda cost: cost.tail_cycles) + round(costs.shared_tail),
        LOOP: round(costs.tick * look.program.num_ticks),
        "optimizer": round(costs.outside),
    }
