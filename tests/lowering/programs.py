"""Random schedules for the tests of the lowering."""

import random

from hypothesis import strategies as st

from jaxpipe.schedules import Op, Schedule

NAMES = ("1f1b", "eager_1f1b", "gpipe")
sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@st.composite
def random_schedules(draw):
    """A random topological order of the ops, dealt to the ranks in that order: any table that does not deadlock."""
    stages, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return in_random_order(tuple(range(stages)), micro_batches, draw(st.integers(0, 2**32)))


@st.composite
def random_placements(draw):
    """Up to 5 ranks with 1 to 3 stages each, anywhere."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    return tuple(draw(st.permutations([rank for rank, count in enumerate(counts) for _ in range(count)])))


def in_random_order(placement, micro_batches, seed, in_order=False):
    """A table with stages on these ranks, whose ops are in a random order that does not deadlock.

    With `in_order` each stage takes the micro-batches in order.
    """
    rng, stages = random.Random(seed), len(placement)
    todo = {Op(k, s, m) for k in "FB" for s in range(stages) for m in range(micro_batches)}
    rows = [[] for _ in range(1 + max(placement))]
    done = set()
    while todo:
        ready = sorted(op for op in todo if _needs(op, stages) <= done)
        if in_order:
            ready = [op for op in ready if all(Op(op.kind, op.stage, m) in done for m in range(op.micro_batch))]
        op = rng.choice(ready)
        rows[placement[op.stage]].append(op)
        todo.remove(op)
        done.add(op)
    return Schedule(rows=tuple(map(tuple, rows)), placement=placement)


def loop_of(ranks, chunks):
    """Stage s on rank s mod ranks."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def v_of(ranks):
    """Down the ranks and back up."""
    return (*range(ranks), *reversed(range(ranks)))


def _needs(op, stages):
    if op.kind == "F":
        return {Op("F", op.stage - 1, op.micro_batch)} if op.stage else set()
    after = {Op("B", op.stage + 1, op.micro_batch)} if op.stage + 1 < stages else set()
    return after | {Op("F", op.stage, op.micro_batch)}
