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
    rng = random.Random(draw(st.integers(0, 2**32)))
    todo = {Op(k, s, m) for k in "FB" for s in range(stages) for m in range(micro_batches)}
    rows = [[] for _ in range(stages)]
    done = set()
    while todo:
        ready = sorted(op for op in todo if _needs(op, stages) <= done)
        op = rng.choice(ready)
        rows[op.stage].append(op)
        todo.remove(op)
        done.add(op)
    return Schedule(rows=tuple(map(tuple, rows)), placement=tuple(range(stages)))


def _needs(op, stages):
    if op.kind == "F":
        return {Op("F", op.stage - 1, op.micro_batch)} if op.stage else set()
    after = {Op("B", op.stage + 1, op.micro_batch)} if op.stage + 1 < stages else set()
    return after | {Op("F", op.stage, op.micro_batch)}
