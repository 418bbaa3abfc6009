"""Partitions against brute force, and every message a user can provoke."""

import time
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.errors import PartitionError
from jaxpipe.model.partition import balanced, by_type, explicit, partition, uniform

unhurried = settings(deadline=None)  # a busy machine is no failure

weights_lists = st.one_of(
    st.lists(st.integers(0, 12), min_size=1, max_size=9),
    st.lists(st.sampled_from([0, 1]), min_size=1, max_size=9),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=9),
    st.lists(st.floats(0, 1e300) | st.integers(0, 10**40), min_size=1, max_size=9),
)


@st.composite
def problems(draw):
    weights = draw(weights_lists)
    return weights, draw(st.integers(1, min(5, len(weights))))


def loads(weights, boundaries):
    """Exact stage weights."""
    return [sum(map(Fraction, weights[start:end])) for start, end in pairwise(boundaries)]


def brute_force(weights, num_stages):
    """Every partition, ranked by the four rules in the docstring of `balanced`."""
    num_layers = len(weights)

    def rank(boundaries):
        stages = loads(weights, boundaries)
        counts = [end - start for start, end in pairwise(boundaries)]
        later_is_better = [-boundary for boundary in reversed(boundaries)]
        return max(stages), sum(x * x for x in stages), sum(n * n for n in counts), later_is_better

    cuts = combinations(range(1, num_layers), num_stages - 1)
    return min(((0, *inner, num_layers) for inner in cuts), key=rank)


def assert_legal(boundaries, num_layers, num_stages):
    assert type(boundaries) is tuple and all(type(boundary) is int for boundary in boundaries)
    assert len(boundaries) == num_stages + 1
    assert boundaries[0] == 0 and boundaries[-1] == num_layers
    assert all(start < end for start, end in pairwise(boundaries))


# Uniform ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [
        (10, 3, (0, 4, 7, 10)),
        (10, 4, (0, 3, 6, 8, 10)),
        (7, 3, (0, 3, 5, 7)),
        (5, 2, (0, 3, 5)),
        (5, 4, (0, 2, 3, 4, 5)),
        (38, 8, (0, 5, 10, 15, 20, 25, 30, 34, 38)),
        (1, 1, (0, 1)),
        (4, 4, (0, 1, 2, 3, 4)),
    ],
)
def test_uniform(num_layers, num_stages, expected):
    assert uniform(num_layers, num_stages) == expected


@unhurried
@given(st.integers(1, 200), st.data())
def test_uniform_differs_by_at_most_one_and_starts_with_the_larger(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    boundaries = uniform(num_layers, num_stages)
    assert_legal(boundaries, num_layers, num_stages)
    counts = [end - start for start, end in pairwise(boundaries)]
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1
    assert counts.count(counts[0]) in (num_layers % num_stages, num_stages)


# Balanced -----------------------------------------------------------------------------------------------------------


@unhurried
@given(problems())
def test_balanced_is_the_best_of_all_partitions(problem):
    weights, num_stages = problem
    boundaries = balanced(weights, num_stages)
    assert_legal(boundaries, len(weights), num_stages)
    assert boundaries == brute_force(weights, num_stages)


@unhurried
@given(st.integers(1, 120), st.integers(0, 5) | st.floats(0, 5), st.data())
def test_equal_weights_give_the_uniform_partition(num_layers, weight, data):
    num_stages = data.draw(st.integers(1, num_layers))
    assert balanced([weight] * num_layers, num_stages) == uniform(num_layers, num_stages)


@unhurried
@given(problems(), st.integers(1, 1000))
def test_the_unit_of_the_weights_does_not_matter(problem, factor):
    weights, num_stages = problem
    scaled = [Fraction(weight) * factor for weight in weights]
    assert balanced(scaled, num_stages) == balanced(weights, num_stages)  # pyright: ignore[reportArgumentType]


@unhurried
@given(st.lists(st.integers(0, 50), min_size=60, max_size=120), st.integers(1, 40))
def test_larger_problems_meet_the_lower_bounds(weights, num_stages):
    boundaries = balanced(weights, num_stages)
    assert_legal(boundaries, len(weights), num_stages)
    heaviest = max(loads(weights, boundaries))
    assert heaviest >= max(max(weights), Fraction(sum(weights), num_stages))
    # A partition with a lighter heaviest stage does not exist: greedy filling below that weight runs out of stages.
    used, load = 1, 0
    for weight in weights:
        if load + weight >= heaviest:
            used, load = used + 1, 0
        load += weight
    assert heaviest == 0 or used > num_stages or heaviest == max(weights)


ALEXNET = [23296, 0, 0, 307392, 0, 0, 663936, 0, 884992, 0, 590080, 0, 0, 0, 2570]
BERT_LARGE = [52559872] + [12596224] * 24 + [0, 52559872]
LINEAR_STACK = [16512, 16384, 0, 16384, 0, 16384, 0, 16384, 0, 16512]


@pytest.mark.parametrize(
    ("weights", "num_stages", "deepspeed"),
    [
        ([1] * 10, 1, [0, 10]),
        ([1] * 8, 4, [0, 2, 4, 6, 8]),
        ([1] * 5, 4, [0, 2, 3, 4, 5]),
        ([1] * 7, 3, [0, 3, 5, 7]),
        ([2, 9, 4, 5], 3, [0, 2, 3, 4]),
        ([0, 1, 2, 3, 3, 3], 4, [0, 3, 4, 5, 6]),
        ([0.0, 1.1, 1.9, 3.0, 3.0, 3.0], 4, [0, 3, 4, 5, 6]),
        ([0.0, 1.1, 30, 3.0], 3, [0, 2, 3, 4]),
        ([0.0, 1.1, 1.9, 3.0, 30.0], 2, [0, 4, 5]),
        ([1, 1, 1, 1, 0, 1], 4, [0, 2, 3, 5, 6]),
        ([1, 0, 0, 0, 1], 2, [0, 4, 5]),
        ([0] * 6, 3, [0, 4, 5, 6]),
        (BERT_LARGE, 8, [0, 1, 5, 9, 13, 17, 21, 26, 27]),
        ([0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], 4, [0, 4, 5, 6, 11]),
        ([0, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0], 4, [0, 4, 6, 9, 11]),
        (ALEXNET, 1, [0, 15]),
        (ALEXNET, 2, [0, 8, 15]),
        (ALEXNET, 3, [0, 8, 10, 15]),
        (ALEXNET, 4, [0, 6, 8, 10, 15]),
        (LINEAR_STACK, 2, [0, 5, 10]),
        (LINEAR_STACK, 4, [0, 1, 5, 9, 10]),
        ([1056] * 8 + [33], 2, [0, 4, 9]),
    ],
)
def test_never_worse_than_deepspeed(weights, num_stages, deepspeed):
    assert_legal(tuple(deepspeed), len(weights), num_stages)
    assert max(loads(weights, balanced(weights, num_stages))) <= max(loads(weights, deepspeed))


def test_strictly_better_where_deepspeed_is_not_optimal():
    assert balanced([2, 9, 4, 5], 3) == (0, 1, 2, 4)


def test_layers_without_weight_are_spread():
    assert balanced([0] * 6, 3) == (0, 2, 4, 6)
    assert balanced([1, 0, 0, 0, 1], 2) == (0, 3, 5)
    assert balanced([9, 4, 4, 4, 4, 0, 9], 4) == (0, 1, 3, 5, 7), "the picture in the module's docstring"


@pytest.mark.parametrize("scalar", [np.int32, np.int64, np.float32, np.float64, bool])
def test_numpy_weights_give_plain_integers(scalar):
    assert_legal(balanced([scalar(x) for x in (1, 0, 1, 1, 0)], 3), 5, 3)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "3", None, 1j])
def test_bad_weights(bad):
    with pytest.raises(PartitionError, match="weight of layer 1 is .*finite numbers, 0 or more"):
        balanced([1, bad, 2], 2)


@pytest.mark.parametrize(
    "weights",
    [[(7 * i) % 13 for i in range(1000)], [1] * 999 + [10**12], [1.0 / (i + 1) for i in range(1000)]],
    ids=["mixed", "giant", "floats"],
)
def test_a_thousand_layers_into_64_stages_take_no_time(weights):
    start = time.process_time()
    assert_legal(balanced(weights, 64), 1000, 64)
    assert time.process_time() - start < 5, "normally below half a second"


# By type ------------------------------------------------------------------------------------------------------------

NAMES = ["Embed", "Block", "relu", "Block", "Block", "Block", "Head"]


def test_by_type_counts_matches_only():
    assert by_type(NAMES, "block", 2) == (0, 4, 7)
    assert by_type(NAMES, "^(embed|head)$", 2) == balanced([1, 0, 0, 0, 0, 0, 1], 2)
    assert by_type(["a:b", "b", "a:b"], "a:b", 2) == (0, 2, 3), "a colon belongs to the pattern"


def test_by_type_may_have_fewer_matches_than_stages():
    assert_legal(by_type(NAMES, "Head", 3), 7, 3)


def test_by_type_without_a_match_lists_the_names():
    with pytest.raises(PartitionError, match=r"'type:conv'.*Embed \(x1\), Block \(x4\), relu \(x1\), Head \(x1\)"):
        by_type(NAMES, "conv", 2)


def test_by_type_with_a_broken_pattern():
    with pytest.raises(PartitionError, match=r"'type:\(': not a regular expression"):
        by_type(NAMES, "(", 2)


# Explicit -----------------------------------------------------------------------------------------------------------


@unhurried
@given(problems())
def test_explicit_accepts_every_legal_partition(problem):
    weights, num_stages = problem
    boundaries = balanced(weights, num_stages)
    assert explicit(list(boundaries), len(weights), num_stages) == boundaries
    assert_legal(explicit(np.array(boundaries), len(weights), num_stages), len(weights), num_stages)  # pyright: ignore[reportArgumentType]


@unhurried
@given(st.lists(st.integers(-2, 8), max_size=6), st.integers(1, 6), st.integers(1, 4))
def test_explicit_accepts_nothing_else(boundaries, num_layers, num_stages):
    legal = (
        len(boundaries) == num_stages + 1
        and (boundaries[0], boundaries[-1]) == (0, num_layers)
        and all(start < end for start, end in pairwise(boundaries))
    )
    if legal:
        assert explicit(boundaries, num_layers, num_stages) == tuple(boundaries)
    else:
        with pytest.raises(PartitionError):
            explicit(boundaries, num_layers, num_stages)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([0, 9], r"\[0, 9\] has 2 boundaries. 8 layers in 2 stages need 3 boundaries.*for example \[0, 4, 8\]"),
        ([0, 4, 9], r"runs from 0 to 9.*rising from 0 to 8"),
        ([1, 4, 8], r"runs from 1 to 8"),
        ([0, 8, 8], r"stage 1 would run from layer 8 to layer 8; every stage must hold at least one layer"),
        ([0, 9, 8], r"stage 1 would run from layer 9 to layer 8"),
        ([0, 4.0, 8], r"boundaries must be integers"),
        ([0, None, 8], r"boundaries must be integers"),
    ],
)
def test_explicit_messages(boundaries, message):
    with pytest.raises(PartitionError, match=message):
        explicit(boundaries, 8, 2)


# The dispatcher -----------------------------------------------------------------------------------------------------


def dispatch(method, num_stages=3, weights=None):
    def refuse(kind):
        raise AssertionError(f"weights({kind!r}) must not be computed for {method!r}")

    return partition(method, num_layers=7, num_stages=num_stages, names=NAMES, weights=weights or refuse)


def test_methods():
    asked = []

    def weights(kind):
        asked.append(kind)
        return {"parameters": [2, 9, 4, 5, 0, 0, 0], "cost": [1, 1, 1, 1, 1, 1, 30]}[kind]

    assert dispatch("uniform") == uniform(7, 3)
    assert dispatch("type:Block") == by_type(NAMES, "Block", 3)
    assert dispatch([0, 1, 2, 7]) == dispatch((0, 1, 2, 7)) == (0, 1, 2, 7)
    assert asked == []
    assert dispatch("parameters", weights=weights) == (0, 1, 2, 7)
    assert dispatch("cost", weights=weights) == (0, 3, 6, 7)
    assert asked == ["parameters", "cost"]


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("unifrom", "Did you mean 'uniform'"),
        ("Parameters", "Did you mean 'parameters'"),
        ("costs", "Did you mean 'cost'"),
        ("type", "Did you mean 'type:<regex>'"),
        ("type:", "Did you mean 'type:<regex>'"),
        ("profile", "It must be 'uniform', 'parameters', 'cost'"),
        ("parameters:x", "Did you mean 'parameters'"),
    ],
)
def test_unknown_method(method, hint):
    with pytest.raises(PartitionError, match=f"partition_method='{method}' is not known.*{hint}"):
        dispatch(method)


@pytest.mark.parametrize("method", ["uniform", "parameters", "cost", "type:Block", list(range(9))])
def test_more_stages_than_layers(method):
    with pytest.raises(PartitionError, match="7 layers cannot fill 8 stages.*at least one layer.*at most 7 stages"):
        dispatch(method, num_stages=8)


@pytest.mark.parametrize(
    "cut",
    [uniform, lambda n, s: balanced([1] * n, s), lambda n, s: by_type(["a"] * n, "a", s)],
    ids=["uniform", "balanced", "by_type"],
)
def test_bad_counts(cut):
    with pytest.raises(PartitionError, match="num_stages=0: a pipeline has at least one stage"):
        cut(3, 0)
    with pytest.raises(PartitionError, match="cannot fill 4 stages"):
        cut(3, 4)


def test_no_layers():
    with pytest.raises(PartitionError, match="0 layers cannot fill 1 stages.*Give at least one layer"):
        uniform(0, 1)
