"""Where to cut a list of layers into stages: integers in, boundaries out.

A partition of L layers into S stages is a tuple of S + 1 boundaries: stage s holds the layers `boundaries[s]` up to,
not including, `boundaries[s + 1]`. Every stage holds at least one layer; whether a layer has weights, matches a pattern
or costs anything plays no part in that rule.

    layers     | embed | block  block | block  block | norm  head |
    weights    |   9   |   4      4   |   4      4   |   0     9  |
    boundaries 0       1              3              5            7     stages weigh 9, 8, 8, 9

No JAX and no NumPy here: a partition is decided once, on the host, and must not depend on floating point rounding.
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
"""Names that `partition` takes besides `"type:<regex>"` and explicit boundaries."""


def uniform(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Equal numbers of layers; the first `num_layers % num_stages` stages get one more.

    Raises: `PartitionError` if there are more stages than layers.
    """
    _check_counts(num_layers, num_stages)
    size, extra = divmod(num_layers, num_stages)
    return tuple(stage * size + min(stage, extra) for stage in range(num_stages + 1))


def balanced(weights: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """The partition whose heaviest stage is as light as possible, since that stage sets the pace of the pipeline.

    Many partitions usually share that optimum. Among them, in this order:

    1. the smallest sum of squared stage weights: the stages that are not the heaviest are levelled too;
    2. the smallest sum of squared layer counts: layers of weight zero (activations, reshapes) are spread, not piled up;
    3. the latest cuts: early stages take the surplus, as in `uniform`. Equal weights give exactly `uniform`.

    The heaviest stage is found by bisection with a greedy fill. The tie-breaks are a dynamic program over (stage, last
    layer); its cost satisfies the quadrangle inequality, so the best cuts are monotone, and divide and conquer finds
    them in O(S L log L) instead of O(S L²) (1000 layers into 64 stages: a few tenths of a second).

    Args:
        weights: one non-negative int or float per layer, any unit. Sums are exact: floats are scaled to integers.
        num_stages: S, at most `len(weights)`.

    Raises:
        PartitionError: more stages than layers, or a weight that is negative, infinite or not a number.

    Reference: Yao, *Efficient dynamic programming using quadrangle inequalities*, STOC 1980.
    """
    num_layers = len(weights)
    _check_counts(num_layers, num_stages)
    prefix = list(accumulate(_integers(weights), initial=0))
    bottleneck = _bottleneck(prefix, num_stages)
    # One integer orders both tie-breaks: layer counts only speak below the unit of weight.
    unit = num_layers * num_layers + 1

    totals = {0: 0}  # end of the stages so far -> least cost; keys are always a range
    cuts: list[dict[int, int]] = []  # per stage: end -> start
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
    """Equal numbers of the layers whose name matches; the others weigh nothing and follow.

    Args:
        names: one name per layer, usually its class.
        pattern: regular expression, searched anywhere in the name, upper and lower case alike.

    Raises:
        PartitionError: `pattern` matches no layer or is not a regular expression, or there are more stages than layers.
            More stages than *matches* is allowed: some stages then hold only layers that do not match.
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
    """The user's own boundaries, checked.

    Raises: `PartitionError` unless there are `num_stages + 1` integers, strictly increasing from 0 to `num_layers`.
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
    """Boundaries by any of the ways a user may ask for them.

    Args:
        method: `"uniform"`, `"parameters"`, `"cost"`, `"type:<regex>"`, or the boundaries themselves.
        names: one name per layer, for `"type:..."`.
        weights: gives one weight per layer for `"parameters"` (numbers of parameters) or `"cost"` (FLOPs). A function,
            because counting means tracing every layer: it is called only by the methods that need it.

    Raises:
        PartitionError: the method is unknown, or cannot be followed.
    """
    assert len(names) == num_layers, f"{len(names)} names for {num_layers} layers: a bug in jaxpipe, please report it"
    check_method(method)
    # Before any weight is computed: a pipeline that is too long is the commoner mistake, and counting is slow.
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
        computed = weights(method)
        assert len(computed) == num_layers, f"{len(computed)} weights for {num_layers} layers: a bug in jaxpipe"
        return balanced(computed, num_stages)
    hint = did_you_mean(method, (*METHODS, "type:<regex>"), cutoff=0.5)
    raise PartitionError(
        f"partition_method={method!r} is not known.{hint} It must be 'uniform', 'parameters', 'cost', 'type:<regex>' "
        "(such as 'type:block'), or a list of boundaries (such as [0, 4, 8])."
    )


def check_method(method: object) -> None:
    """Raises PartitionError for what is neither a string nor a list of boundaries."""
    if not isinstance(method, str | Iterable) or isinstance(method, bytes | Mapping | Set):
        raise PartitionError(
            f"partition_method={method!r} must be 'uniform', 'parameters', 'cost', 'type:<regex>' (such as 'type:block'), "
            "or a list of boundaries (such as [0, 4, 8])."
        )


def _check_counts(num_layers: int, num_stages: int) -> None:
    # NumPy's integers are integers here; a bool or "2" is a mistake.
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
        # By way of int and float, because NumPy's scalars are not all accepted by Fraction.
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
        # Greedy may need fewer stages than given; a stage of several layers can always be split, and gets no heavier.
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
    """One more stage: for each end, the least total cost and the start (the latest of the best) that gives it.

    `starts` and `ends` are inclusive ranges. A stage of weight w and n layers costs w² in units of `unit`, plus n².
    """
    least: dict[int, int] = {}
    chosen: dict[int, int] = {}

    def total(start: int, end: int) -> int:
        return totals[start] + unit * (prefix[end] - prefix[start]) ** 2 + (end - start) ** 2

    def solve(ends: tuple[int, int], starts: tuple[int, int]) -> None:
        # The best start never moves left as the end moves right. That survives the two limits below, which only make
        # stages that are too heavy or empty infinitely dear: they cut off the corners of the table, not holes in it.
        low, high = ends
        if low > high:
            return
        end = (low + high) // 2
        earliest = max(starts[0], bisect_left(prefix, prefix[end] - bottleneck))
        latest = min(starts[1], end - 1)
        start = min(range(latest, earliest - 1, -1), key=lambda start: total(start, end))
        least[end], chosen[end] = total(start, end), start
        solve((low, end - 1), (starts[0], start))
        solve((end + 1, high), (start, starts[1]))

    solve(ends, starts)
    return least, chosen
