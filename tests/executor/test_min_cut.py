"""The cheapest set that separates, against all sets there are."""

import itertools
import random

import pytest

from jaxpipe.executor.min_cut import Network


def networks(seed):
    """(costs, which values are made, of what others follow, which are needed) of up to 8 values, each after its sources."""
    rng = random.Random(seed)
    count = rng.randint(1, 8)
    costs = [rng.randint(0, 9) for _ in range(count)]
    sources = [rng.sample(range(n), rng.randint(0, min(n, 3))) for n in range(count)]
    made = {n for n in range(count) if not sources[n] or rng.random() < 0.2}
    needed = {n for n in range(count) if rng.random() < 0.4} or {count - 1}
    return costs, made, sources, needed


def enough(brought, made, sources, needed):
    """Whether the far side gets all it needs if these values are brought."""

    def has(n):
        return n in brought or (n not in made and all(map(has, sources[n])))

    return all(map(has, needed))


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_no_set_is_cheaper(seed):
    for each in range(seed, seed + 20):
        costs, made, sources, needed = networks(each)
        network = Network()
        for n, cost in enumerate(costs):
            network.value(n, cost)
        for n in range(len(costs)):
            if n in made:
                network.made(n)
            else:
                for source in sources[n]:
                    network.follows(n, source)
        for n in needed:
            network.needed(n)
        found = network.cut()
        assert enough(set(found), made, sources, needed)
        every = itertools.chain.from_iterable(
            itertools.combinations(range(len(costs)), k) for k in range(len(costs) + 1)
        )
        least = min(sum(costs[n] for n in some) for some in every if enough(set(some), made, sources, needed))
        assert sum(costs[n] for n in found) == least


def test_of_equal_costs_the_set_nearest_to_what_is_needed():
    """So that the least is made again."""
    network = Network()
    for name in "abc":
        network.value(name, 5)
    network.made("a")
    network.follows("b", "a")
    network.follows("c", "b")
    network.needed("c")
    assert network.cut() == ["c"]


def test_a_value_that_cannot_be_brought_is_made_again():
    network = Network()
    network.value("input", 7)
    network.made("input")
    network.value("key", None)
    network.follows("key", "input")
    network.needed("key")
    assert network.cut() == ["input"]
