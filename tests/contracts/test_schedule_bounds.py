"""Makespan and memory of every schedule with chunks or a split backward are at most what theory says, for any counts. And
barriers between the ticks of a compiled loop cost nothing if F, I and W take the same time.

Sizes are drawn at random, the same ones in every run. `JAXPIPE_ALL_SIZES=1` runs all of them, which takes minutes.
"""

import itertools
import os
import random
from fractions import Fraction

import pytest

from jaxpipe.schedules import registry, simulate

COSTS = [tuple(map(Fraction, costs)) for costs in (("1", "1", "1"), ("1", "1.1", "0.8"), ("0.88", "0.95", "0.81"))]
SIZES = list(itertools.product(range(2, 9), range(1, 33), range(1, 5)))  # p, m, v


def largest_group(p, m):
    return -(-m // max(1, m // p))


def like_interleaved(p, m, v, forward, backward):
    """What filling and draining costs when F and B of a chunk are one op each; with m < p no order can do better."""
    rounds = p - 1 if m >= p else (p - m) * v + m - 1
    return Fraction(rounds, v) * (forward + backward)


def bound(name, p, m, v, costs):
    """(bubble, peak) in the time and the micro-batches of a whole rank."""
    f, i, w = costs
    group = largest_group(p, m)
    if name == "interleaved":
        return like_interleaved(p, m, v, f, i + w), Fraction((v - 1) * group + 2 * (p - 1) + 1, v)
    if name == "looped_bfs":
        return like_interleaved(p, m, v, f, i + w), m
    if name == "zero_bubble":
        return (p - 1) * (f + i) - (min(m, p) - 1) * w, p
    if name == "interleaved_zero_bubble":
        bubble = Fraction(p - 1, v) * (f + i - w) if m >= p else like_interleaved(p, m, v, f, i + w)
        return bubble, Fraction((v - 1) * group + p, v)
    assert name == "zbv"
    return (p - 1) * i / 2 if m >= 2 * p - 1 else (p - 1) * (f + i) - (min(m, p) - 1) * w, p


def cases():
    for name in ("interleaved", "looped_bfs", "zero_bubble", "interleaved_zero_bubble", "zbv"):
        chunked = name in registry.CHUNKED
        sizes = [(p, m, v) for p, m, v in SIZES if chunked or v == registry.OWN_CHUNKS.get(name, 1)]
        if not os.environ.get("JAXPIPE_ALL_SIZES"):
            # Beside random ones those at the edges of the conditions: one micro-batch, around p and around 2p - 1.
            edges = [(p, m, v) for p, m, v in sizes if p == 4 and m in (1, p - 1, p, p + 1, 2 * p - 2, 2 * p - 1)]
            sizes = edges + random.Random(name).sample(sizes, 12)
        yield pytest.param(name, sizes, id=name)


@pytest.mark.parametrize(("name", "sizes"), list(cases()))
def test_makespan_and_memory_are_at_most_the_bounds(name, sizes):
    for p, m, v in sizes:
        table = registry.get(name, p * v, m, v)
        assert (table.num_ranks, table.num_chunks, table.num_micro_batches) == (p, v, m)
        for costs in COSTS:
            bubble, peak = bound(name, p, m, v, costs)
            found = simulate(table, *costs)
            where = f"p={p}, m={m}, v={v}, costs {' '.join(map(str, costs))}"
            assert found.bubble <= bubble, f"{where}: bubble {found.bubble} > {bubble}"
            assert max(found.peak_live) <= min(m, peak), f"{where}: holds {max(found.peak_live)} > {min(m, peak)}"
        # Of a table that splits no backward it holds for any costs, because no column mixes F and B.
        for costs in COSTS[: 1 if table.split_backward else 2]:
            free = simulate(table, *costs).makespan
            assert simulate(table, *costs, sync="global").makespan == free, f"p={p}, m={m}, v={v}: barriers cost time"
