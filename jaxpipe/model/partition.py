"""Decides where to cut a list of layers into stages. It takes integers and returns boundaries.

A partition of L layers into S stages is a tuple of S + 1 boundaries: stage s holds the layers from `boundaries[s]` up to,
but not including, `boundaries[s + 1]`. Every stage holds at least one layer, whether or not that layer has weights,
matches a pattern, or costs anything.

    layers     | embed | block  block | block  block | norm  head |
    weights    |   9   |   4      4   |   4      4   |   0     9  |
    boundaries 0       1              3              5            7     stages weigh 9, 8, 8, 9

This module uses neither JAX nor NumPy: a partition is decided once, on the host, and must not depend on rounding.
"""

import math
import operator
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fractions import Fraction
from itertools import accumulate, pairwise
from numbers import Rational, Real

from jaxpipe.checks import did_you_mean
from jaxpipe.errors import PartitionError

__all__ = ["balanced", "by_type", "explicit", "partition", "uniform"]

METHODS = ("uniform", "parameters", "cost")
"""The names that `partition` takes, besides `"type:<regex>"` and explicit boundaries."""


def uniform(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Gives equal numbers of layers to all stages; the first `num_layers % num_stages` stages get one more.

    Raises:
      PartitionError: there are more stages than layers.
    """
    _check_counts(num_layers, num_stages)
    size, extra = divmod(num_layers, num_stages)
    return tuple(stage * size + min(stage, extra) for stage in range(num_stages + 1))


def balanced(weights: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Finds the partition whose heaviest stage is as light as possible, because that stage sets the pace of the pipeline.

    Usually many partitions share that optimum. Among them, these rules decide, in this order:

    1. the smallest sum of squared stage weights, so that the stages that are not the heaviest are levelled too;
    2. the smallest sum of squared layer counts, so that layers of weight zero (activations, reshapes) are spread;
    3. the latest cuts, so that early stages take the surplus, as in `uniform`. Equal weights give exactly `uniform`.

    The weight of the heaviest stage is found by bisection with a greedy fill. The other rules are a dynamic program over
    (stage, last layer). Its cost satisfies the quadrangle inequality, so the best cuts are monotone, and divide and
    conquer finds them in O(S L log L) instead of O(S L²): a few tenths of a second for 1000 layers in 64 stages.

    Args:
      weights: one non-negative int or float per layer, in any unit. Sums are exact, because floats are scaled to integers.
      num_stages: S, at most `len(weights)`.

    Raises:
      PartitionError: there are more stages than layers, or a weight is negative, infinite or not a number.

    Reference: Yao, *Efficient dynamic programming using quadrangle inequalities*, STOC 1980.
    """
    num_layers = len(weights)
    _check_counts(num_layers, num_stages)
    prefix = list(accumulate(_integers(weights), initial=0))
    bottleneck = _bottleneck(prefix, num_stages)
    # One integer serves rules 1 and 2: all squared layer counts together are less than one unit of weight.
    unit = num_layers * num_layers + 1

    totals = {0: 0}  # from the end of the stages so far to their least cost; the keys are always a range
    cuts: list[dict[int, int]] = []  # for each stage, from its end to its start
    for stage in range(num_stages):
        first, last = stage, max(totals)
        reach = min(bisect_right(prefix, prefix[last] + bottleneck) - 1, num_layers)
        totals, starts = _extend(totals, (first, last), (stage + 1, reach), prefix, bottleneck, unit)
        cuts.append(starts)

    boundaries = [num_layers]
    for starts in reversed(cuts):
        boundaries.append(starts[boundaries[-1]])
    return tuple(reversed(boundaries))


def by_type(names: Sequence[str], pattern: str, num_stages: int) -> tuple[int, ...]:
    """Gives equal numbers of the layers whose name matches to all stages. The other layers weigh nothing.

    More stages than matching layers are allowed. Some stages then hold only layers that do not match.

    Args:
      names: one name per layer, usually its class.
      pattern: a regular expression, which is searched anywhere in the name, in upper and lower case alike.
      num_stages: S.

    Raises:
      PartitionError: `pattern` matches no layer or is not a regular expression, or there are more stages than layers.
    """
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise PartitionError(
            f"partition_method='type:{pattern}': not a regular expression ({error}). "
            "Escape special characters with a backslash, or write a plain part of a layer's name."
        ) from error
    weights = [int(found.search(name) is not None) for name in names]
    if not any(weights):
        listed = ", ".join(f"{name} (x{count})" for name, count in Counter(names).items())
        raise PartitionError(
            f"partition_method='type:{pattern}': no layer's name matches; at least one must. Layers found: {listed}."
        )
    return balanced(weights, num_stages)


def explicit(boundaries: Sequence[int], num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Checks the user's own boundaries, and returns them as a tuple of ints.

    Raises:
      PartitionError: they are not `num_stages + 1` integers that rise strictly from 0 to `num_layers`.
    """
    shown = f"partition_method={list(boundaries)}"
    rule = f"{num_layers} layers in {num_stages} stages need {num_stages + 1} boundaries, rising from 0 to {num_layers}"
    try:
        checked = tuple(operator.index(boundary) for boundary in boundaries)
    except TypeError as error:
        raise PartitionError(f"{shown}: boundaries must be integers ({error}). {rule}.") from error
    _check_counts(num_layers, num_stages)
    example = f"for example {list(uniform(num_layers, num_stages))}"
    if len(checked) != num_stages + 1:
        raise PartitionError(f"{shown} has {len(checked)} boundaries. {rule}, {example}.")
    if checked[0] != 0 or checked[-1] != num_layers:
        raise PartitionError(f"{shown} runs from {checked[0]} to {checked[-1]}. {rule}, {example}.")
    for stage, (start, end) in enumerate(pairwise(checked)):
        if end <= start:
            raise PartitionError(
                f"{shown}: stage {stage} would run from layer {start} to layer {end}; every stage must hold at least "
                f"one layer. {rule}, {example}."
            )
    return checked


def partition(
    method: str | Sequence[int],
    *,
    num_layers: int,
    num_stages: int,
    names: Sequence[str],
    weights: Callable[[str], Sequence[float]],
) -> tuple[int, ...]:
    """Finds the boundaries in the way that the user asks for.

    Args:
      method: `"uniform"`, `"parameters"`, `"cost"`, `"type:<regex>"`, or the boundaries themselves.
      names: one name per layer, for `"type:..."`.
      weights: gives one weight per layer for `"parameters"` (numbers of parameters) or `"cost"` (FLOPs). It is a function,
        because counting means tracing every layer; only the methods that need the weights call it.

    Raises:
      PartitionError: the method is unknown, or cannot be followed.
    """
    assert len(names) == num_layers, f"{len(names)} names for {num_layers} layers: a bug in jaxpipe, please report it"
    check_method(method)
    # This comes before any weight is computed: a pipeline that is too long is a common mistake, and counting is slow.
    _check_counts(num_layers, num_stages)
    num_stages = operator.index(num_stages)
    if not isinstance(method, str):
        return explicit(method, num_layers, num_stages)
    kind, _, pattern = method.partition(":")
    if kind == "type" and pattern:
        return by_type(names, pattern, num_stages)
    if method == "uniform":
        return uniform(num_layers, num_stages)
    if method in METHODS:
        if num_stages in (1, num_layers):
            return uniform(num_layers, num_stages)  # there is one way to cut, so nothing needs to be counted
        computed = weights(method)
        assert len(computed) == num_layers, f"{len(computed)} weights for {num_layers} layers: a bug in jaxpipe"
        return balanced(computed, num_stages)
    hint = did_you_mean(method, (*METHODS, "type:<regex>"), cutoff=0.5)
    raise PartitionError(
        f"partition_method={method!r} is not known.{hint} It must be 'uniform', 'parameters', 'cost', 'type:<regex>' "
        "(such as 'type:block'), or a list of boundaries (such as [0, 4, 8])."
    )


def check_method(method: object) -> None:
    """Checks that a method is a string or a list of boundaries.

    Raises:
      PartitionError: it is neither.
    """
    if not isinstance(method, str | Iterable) or isinstance(method, bytes | Mapping | Set):
        raise PartitionError(
            f"partition_method={method!r} must be 'uniform', 'parameters', 'cost', 'type:<regex>' (such as 'type:block'), "
            "or a list of boundaries (such as [0, 4, 8])."
        )


def _check_counts(num_layers: int, num_stages: int) -> None:
    # Integers of NumPy are allowed; a bool or "2" is a mistake.
    if isinstance(num_stages, bool) or not hasattr(type(num_stages), "__index__"):
        raise PartitionError(f"num_stages={num_stages!r} must be an integer, 1 or more.")
    if num_stages < 1:
        raise PartitionError(f"num_stages={num_stages}: a pipeline has at least one stage.")
    if num_layers < num_stages:
        way_out = f"Use at most {num_layers} stages, or give more layers" if num_layers else "Give at least one layer"
        raise PartitionError(
            f"{num_layers} layers cannot fill {num_stages} stages: every stage must hold at least one layer. "
            f"{way_out} (a layer that is itself several layers can be written out as several)."
        )


def _integers(weights: Sequence[float]) -> list[int]:
    """Weights as integers in exact proportion, so that ties are ties and the result is the same on every machine."""
    exact: list[Fraction] = []
    for layer, weight in enumerate(weights):
        if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
            raise PartitionError(f"weight of layer {layer} is {weight!r}: weights must be finite numbers, 0 or more.")
        # By way of int and float, because Fraction does not accept all scalars of NumPy.
        exact.append(
            Fraction(int(weight.numerator), int(weight.denominator))
            if isinstance(weight, Rational)
            else Fraction(float(weight))
        )
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def _bottleneck(prefix: Sequence[int], num_stages: int) -> int:
    """The smallest possible weight of the heaviest stage; `prefix` holds the L + 1 running sums of the weights."""
    num_layers = len(prefix) - 1

    def fits(bound: int) -> bool:
        # The greedy fill may need fewer stages. That fits too: a stage of several layers can be split, and gets no heavier.
        end = 0
        for _ in range(num_stages):
            end = bisect_right(prefix, prefix[end] + bound) - 1
        return end == num_layers

    heaviest = max(end - start for start, end in pairwise(prefix))
    low, high = max(heaviest, -(-prefix[-1] // num_stages)), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _extend(
    totals: dict[int, int],
    starts: tuple[int, int],
    ends: tuple[int, int],
    prefix: Sequence[int],
    bottleneck: int,
    unit: int,
) -> tuple[dict[int, int], dict[int, int]]:
    """Adds one more stage.

    A stage of weight w and n layers costs w² in units of `unit`, plus n².

    Args:
      totals: for each end of the stages so far, their least cost.
      starts, ends: inclusive ranges of where the new stage may start and end.

    Returns:
      For each end of the new stage, the least cost of all stages; and the start of the new stage that gives it. Among
      several such starts the latest is taken.
    """
    least: dict[int, int] = {}
    chosen: dict[int, int] = {}

    def total(start: int, end: int) -> int:
        return totals[start] + unit * (prefix[end] - prefix[start]) ** 2 + (end - start) ** 2

    def solve(first_end: int, last_end: int, first_start: int, last_start: int) -> None:
        # The best start never moves left as the end moves right. The two limits below do not change that. They make
        # stages that are too heavy or empty infinitely expensive, which cuts corners off the table but makes no holes.
        if first_end > last_end:
            return
        end = (first_end + last_end) // 2
        earliest = max(first_start, bisect_left(prefix, prefix[end] - bottleneck))
        latest = min(last_start, end - 1)
        start = min(range(latest, earliest - 1, -1), key=lambda start: total(start, end))
        least[end], chosen[end] = total(start, end), start
        solve(first_end, end - 1, first_start, start)
        solve(end + 1, last_end, start, last_start)

    solve(*ends, *starts)
    return least, chosen
