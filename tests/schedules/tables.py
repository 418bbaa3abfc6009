"""Random valid tables, and an oracle that shares nothing with the code under test: a graph and its longest paths."""

from graphlib import TopologicalSorter

from hypothesis import settings
from hypothesis import strategies as st

from jaxpipe.schedules import Op

# No deadline: on a busy machine it finds the neighbours, not bugs.
examples = settings(deadline=None, max_examples=60)


def edges(rows):
    """Op -> ops it waits for: the dependency law written a second time, and the order within each row."""
    present = {op for row in rows for op in row if op is not None}
    last = max(op.stage for op in present)
    before = {op: set() for op in present}
    for op in present:
        kind, stage, micro_batch = op.kind, op.stage, op.micro_batch
        if kind == "F" and stage > 0:
            before[op].add(Op("F", stage - 1, micro_batch))
        if kind in "BI":
            before[op].add(Op("F", stage, micro_batch))
            if stage < last:
                before[op] |= {Op("B", stage + 1, micro_batch), Op("I", stage + 1, micro_batch)} & present
        if kind == "W":
            before[op].add(Op("I", stage, micro_batch))
    data = {op: frozenset(sources) for op, sources in before.items()}
    for row in rows:
        ops = [op for op in row if op is not None]
        for earlier, later in zip(ops, ops[1:], strict=False):
            before[later].add(earlier)
    return before, data


def runs(rows):
    """Whether the ranks can work through their rows: the graph has no cycle."""
    try:
        list(TopologicalSorter(edges(rows)[0]).static_order())
    except ValueError:
        return False
    return True


def longest_paths(rows, duration, delay):
    """Op -> earliest start, with `delay(source, op)` on data edges only."""
    before, data = edges(rows)
    starts = {}
    for op in TopologicalSorter(before).static_order():
        starts[op] = max(
            (starts[s] + duration(s) + (delay(s, op) if s in data[op] else 0) for s in before[op]), default=0
        )
    return starts


@st.composite
def tables(draw, min_ranks=1, forward_only=None, idle=True):
    """(rows, placement): any placement, any mix of B and I + W, any order that can run, idle cells anywhere."""
    num_ranks = draw(st.integers(min_ranks, 4))
    extra = draw(st.lists(st.integers(0, num_ranks - 1), max_size=4))
    placement = tuple(draw(st.permutations([*range(num_ranks), *extra])))
    num_micro_batches = draw(st.integers(1, 4))
    only = draw(st.booleans()) if forward_only is None else forward_only
    random = draw(st.randoms(use_true_random=False))
    ops = []
    for stage in range(len(placement)):
        for micro_batch in range(num_micro_batches):
            backward = "" if only else random.choice(["B", "IW"])
            ops += [Op(kind, stage, micro_batch) for kind in "F" + backward]
    _, data = edges([[op] for op in ops])
    rows = [[] for _ in range(num_ranks)]
    done = set()
    while len(done) < len(ops):
        op = random.choice([op for op in ops if op not in done and data[op] <= done])
        row = rows[placement[op.stage]]
        if idle and random.random() < 0.2:
            row.append(None)
        row.append(op)
        done.add(op)
    return tuple(map(tuple, rows)), placement
