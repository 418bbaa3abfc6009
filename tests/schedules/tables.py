"""Random valid tables, and an oracle that shares nothing with the code under test: a graph and its longest paths."""

from graphlib import TopologicalSorter
from random import Random

from hypothesis import settings
from hypothesis import strategies as st

from jaxpipe.schedules import Op, Schedule

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
    return _rows(
        random, num_ranks, placement, num_micro_batches, "" if only else "mixed", 0.2 if idle else 0.0
    ), placement


def random_schedule(seed, num_ranks=None, num_micro_batches=None, backward=None, most_chunks=3):
    """A valid training table, the same for the same arguments: any placement, any order that can run, no idle cells.

    Args:
      num_ranks, num_micro_batches: 2 to 4, and 1 to 4, if not given.
      backward: "whole", "split", or "mixed": each stage and micro-batch as it comes. Any of them if not given.
      most_chunks: a rank has one stage to so many.
    """
    random = Random(seed)
    num_ranks = num_ranks or random.randint(2, 4)
    num_micro_batches = num_micro_batches or random.randint(1, 4)
    backward = backward or random.choice(["whole", "split", "mixed"])
    placement = [rank for rank in range(num_ranks) for _ in range(random.randint(1, most_chunks))]
    random.shuffle(placement)
    rows = _rows(random, num_ranks, placement, num_micro_batches, backward, 0.0)
    return Schedule(rows, tuple(placement))


def _rows(random, num_ranks, placement, num_micro_batches, backward, idle):
    ops = []
    for stage in range(len(placement)):
        for micro_batch in range(num_micro_batches):
            halves = {"": "", "whole": "B", "split": "IW"}.get(backward)
            halves = random.choice(["B", "IW"]) if halves is None else halves
            ops += [Op(kind, stage, micro_batch) for kind in "F" + halves]
    _, data = edges([[op] for op in ops])
    rows = [[] for _ in range(num_ranks)]
    done = set()
    while len(done) < len(ops):
        op = random.choice([op for op in ops if op not in done and data[op] <= done])
        row = rows[placement[op.stage]]
        if idle and random.random() < idle:
            row.append(None)
        row.append(op)
        done.add(op)
    return tuple(map(tuple, rows))
