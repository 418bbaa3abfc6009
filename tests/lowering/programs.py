"""Random schedules for the tests of the lowering."""

import random

from hypothesis import strategies as st

from jaxpipe.schedules import Op, Schedule
from jaxpipe.schedules.op import needs

NAMES = ("1f1b", "eager_1f1b", "gpipe")
sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))

# Which part of the backwards comes as I and W.
shares = st.sampled_from([0, 0.5, 1])


@st.composite
def random_schedules(draw):
    """A random topological order of the ops, dealt to the ranks in that order: any table that does not deadlock."""
    stages, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return in_random_order(tuple(range(stages)), micro_batches, draw(st.integers(0, 2**32)), draw(shares))


@st.composite
def random_placements(draw):
    """Up to 5 ranks with 1 to 3 stages each, anywhere."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    return tuple(draw(st.permutations([rank for rank, count in enumerate(counts) for _ in range(count)])))


def in_random_order(placement, micro_batches, seed, split=0.0, in_order=False):
    """A table with stages on these ranks, whose ops are in a random order that does not deadlock.

    About `split` of the backwards come as I and W. With `in_order` each stage takes the micro-batches in order.
    """
    rng, stages = random.Random(seed), len(placement)
    pairs = [(s, m) for s in range(stages) for m in range(micro_batches)]
    halved = {pair for pair in pairs if rng.random() < split}
    todo = {Op(k, *pair) for pair in pairs for k in ("FIW" if pair in halved else "FB")}
    rows = [[] for _ in range(1 + max(placement))]
    done = set()
    while todo:
        ready = sorted(op for op in todo if set(needs(op, stages, halved)) <= done)
        if in_order:  # W takes part in nothing that has an order
            ready = [op for op in ready if all(_came(op, m, done) for m in range(op.micro_batch)) or op.kind == "W"]
        op = rng.choice(ready)
        rows[placement[op.stage]].append(op)
        todo.remove(op)
        done.add(op)
    return Schedule(rows=tuple(map(tuple, rows)), placement=placement)


def _came(op, micro_batch, done):
    """Whether the op of the same sort of another micro-batch is done; B and I are of one sort."""
    kinds = "BI" if op.kind in "BI" else op.kind
    return any(Op(kind, op.stage, micro_batch) in done for kind in kinds)


def loop_of(ranks, chunks):
    """Stage s on rank s mod ranks."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def v_of(ranks):
    """Down the ranks and back up."""
    return (*range(ranks), *reversed(range(ranks)))
