"""Which values of a jaxpr a further axis of the mesh cuts, followed from the weights that it cuts, equation by equation.

It is a small model of what XLA's partitioner does. A value is whole, cut along dims that are known, or cut along one that
is not. A product that contracts a cut dim is a sum over the axis: its result is whole, and has to be reduced. Everything
else that is made of something cut is cut.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

# The dims of a value that are cut; None: one of them, and it is not known which.
Cut = frozenset[int] | None
WHOLE: Cut = frozenset()


def is_cut(cut: Cut) -> bool:
    """Whether each device of the axis has a part only."""
    return cut is None or bool(cut)


def through(equation: JaxprEqn, cuts: Sequence[Cut]) -> tuple[list[Cut], bool]:
    """From the cuts of the operands of an equation without a body to those of its results.

    Returns:
      The cuts, and whether the results are sums over the axis.
    """
    if not any(map(is_cut, cuts)):
        return [WHOLE] * len(equation.outvars), False
    name = equation.primitive.name
    if name == "dot_general":
        cut, summed = _product(equation, cuts[0], cuts[1])
        return [cut], summed
    if name == "gather" and cuts[0] is not None and 0 in cuts[0]:
        return [WHOLE], True  # rows of a table that lie on different devices
    if name == "squeeze":
        return [None if cuts[0] is None else _without(cuts[0], equation.params["dimensions"])], False
    if name in ("slice", "dynamic_slice"):
        return [_sliced(cuts[0], equation.invars[0], equation.outvars[0])], False
    if name == "reshape":
        return [_reshaped(cuts[0], _dims(equation.invars[0]), _dims(equation.outvars[0]))], False
    if name == "transpose":
        (cut,) = cuts
        order = equation.params["permutation"]
        return [None if cut is None else frozenset(new for new, old in enumerate(order) if old in cut)], False
    if name == "broadcast_in_dim" and cuts[0] is not None:
        return [frozenset(equation.params["broadcast_dimensions"][dim] for dim in cuts[0])], False
    if name.startswith("reduce_") and "axes" in equation.params and None not in cuts:
        axes = equation.params["axes"]
        return [_without(cuts[0], axes)] * len(equation.outvars), False
    return [_like(var, equation.invars, cuts) for var in equation.outvars], False


def _product(equation: JaxprEqn, left: Cut, right: Cut) -> tuple[Cut, bool]:
    (contracted, batch) = equation.params["dimension_numbers"]
    if any(cut and set(cut) & set(dims) for cut, dims in zip((left, right), contracted, strict=True)):
        return WHOLE, True
    if left is None or right is None:
        return None, False
    places: dict[tuple[int, int], int] = {}
    for side in (0, 1):
        for number, dim in enumerate(batch[side]):
            places[side, dim] = number
    count = len(batch[0])
    for side, var in enumerate(equation.invars[:2]):
        for dim in range(len(_dims(var))):
            if dim not in contracted[side] and dim not in batch[side]:
                places[side, dim] = count
                count += 1
    return frozenset(places[side, dim] for side, cut in enumerate((left, right)) for dim in cut or ()), False


def _dims(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _without(cut: Cut, axes: Sequence[int]) -> Cut:
    return frozenset(dim - sum(axis < dim for axis in axes) for dim in cut or () if dim not in axes)


def _sliced(cut: Cut, operand: Any, result: Any) -> Cut:
    """A part of an array is cut as the array is, unless it is a part of a dim that is cut."""
    pairs = list(zip(operand.aval.shape, result.aval.shape, strict=True))
    return cut if cut is not None and all(pairs[dim][0] == pairs[dim][1] for dim in cut) else None


def _reshaped(cut: Cut, old: Sequence[int], new: Sequence[int]) -> Cut:
    """A dim that is split is cut in its first part, and one that is joined with others behind it stays cut."""
    if cut is None:
        return None
    found: set[int] = set()
    for dim in cut:
        before = math.prod(old[:dim])
        places = [place for place, size in enumerate(new) if size > 1 and math.prod(new[:place]) == before]
        if not places:
            return None
        found.add(places[0])
    return frozenset(found)


def _like(result: Any, operands: Sequence[Any], cuts: Sequence[Cut]) -> Cut:
    """Of an elementwise operation the dims of its operands; of anything else one that is not known."""
    found: set[int] = set()
    for operand, cut in zip(operands, cuts, strict=True):
        if not is_cut(cut):
            continue
        if cut is None or operand.aval.shape != result.aval.shape:
            return None if result.aval.shape else WHOLE
        found |= cut
    return frozenset(found)
