"""Whether a layer treats every position of a sequence by itself, read off its jaxpr.

While tokens are generated, a layer without a cache is given the newest position alone. That is right only if what it makes
of a position depends neither on other positions nor on where the position stands. Each value of the jaxpr is followed: the
dim along which its positions lie, or, for what comes from no position, the dims along which it is the same everywhere. What
cannot be shown to be local counts as mixed, so a mistake here costs time, and never gives wrong tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax.extend.core as jex

from jaxpipe.model.jaxprs import CALLS, bodies, opened, scan_counts

# Primitives that compute each element from the elements at the same place.
_ELEMENTWISE = frozenset(
    """
    abs acos acosh add and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp convert_element_type copy copy_p
    cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul name ne neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
    tan tanh xor
    """.split()
)
_REDUCE = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
_ALONG_AN_AXIS = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
    "split": "axis",
}


@dataclass(frozen=True)
class _Value:
    """What is known about a value.

    Attributes:
      time: the dim along which its positions lie; None: it comes from no position.
      same: if it comes from no position, the dims along which all of its entries are equal.
    """

    time: int | None = None
    same: frozenset[int] = frozenset()


class _MixedError(Exception):
    """The layer is not known to be local; the message is the equation that decides it."""


def mixes(jaxpr: jex.ClosedJaxpr, times: Sequence[int | None], wanted: Sequence[int | None], knows: bool) -> str | None:
    """What makes a layer depend on other positions, or on where a position stands.

    Args:
      jaxpr: the layer.
      times: per input, the dim along which its positions lie, or None.
      wanted: the same per result.
      knows: whether the layer is told the positions, so that it may depend on where a position stands.

    Returns:
      None if it treats every position by itself, else the name of the primitive that is not known to.
    """
    try:
        found = _Reader(knows).run(opened(jaxpr), [_Value(time) for time in times])
    except _MixedError as mixed:
        return str(mixed)
    for value, time in zip(found, wanted, strict=True):
        if value.time != time and not (value.time is None and time in value.same):
            return "its result"
    return None


class _Reader:
    def __init__(self, knows: bool):
        self.knows = knows

    def run(self, jaxpr: Any, inputs: Sequence[_Value]) -> list[_Value]:
        known: dict[Any, _Value] = {v: _Value() for v in jaxpr.constvars}
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return _Value() if isinstance(atom, jex.Literal) else known[atom]

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self.equation(equation, values), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, values: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        inside, count = bodies(equation), len(equation.outvars)
        if name in CALLS and len(inside) == 1 and len(inside[0].invars) == len(values):
            return self.run(inside[0], values)
        shapes = [getattr(atom.aval, "shape", ()) for atom in equation.invars]
        out = [getattr(atom.aval, "shape", ()) for atom in equation.outvars]
        rule = getattr(self, f"_{name}", None)
        if name == "optimization_barrier":
            return values
        if name in _ELEMENTWISE:
            return [self.together(name, values, shapes)] * count
        if name in _REDUCE or name in _ALONG_AN_AXIS or rule is not None:
            try:
                if name in _REDUCE:
                    return [_without(name, values[0], params["axes"])] * count
                if name in _ALONG_AN_AXIS:
                    return [_kept(name, self.together(name, values, shapes), params[_ALONG_AN_AXIS[name]])] * count
                assert rule is not None
                return [rule(params, values, shapes, out[0])] * count
            except (KeyError, IndexError, AttributeError):  # another version of JAX says it in another way
                raise _MixedError(name) from None
        if name == "scan" and len(inside) == 1:
            return self.scan(equation, values)
        if all(value.time is None for value in values):
            return [_Value()] * count
        raise _MixedError(name)

    def together(self, name: str, values: Sequence[_Value], shapes: Sequence[tuple[int, ...]]) -> _Value:
        """What an elementwise equation makes of its operands, those without dims aside."""
        # A dim of one entry is the same everywhere: elementwise equations repeat it.
        mine = [
            replace(value, same=value.same | {dim for dim, size in enumerate(shape) if size == 1})
            for value, shape in zip(values, shapes, strict=True)
            if shape
        ]
        times = {value.time for value in mine} - {None}
        if not times:
            dims = [value.same for value in mine]
            return _Value(same=frozenset.intersection(*dims) if dims else frozenset())
        if len(times) > 1:
            raise _MixedError(name)
        [time] = times
        if not self.knows and any(value.time is None and time not in value.same for value in mine):
            raise _MixedError(f"{name} with a constant that differs from position to position")
        return _Value(time)

    def _broadcast_in_dim(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        dims, value = params["broadcast_dimensions"], values[0]
        if value.time is not None:
            if out[dims[value.time]] != shapes[0][value.time]:
                raise _MixedError("broadcast_in_dim")
            return _Value(dims[value.time])
        new = {dim for dim in range(len(out)) if dim not in dims}
        new |= {dims[i] for i, size in enumerate(shapes[0]) if i in value.same or (size == 1 != out[dims[i]])}
        return _Value(same=frozenset(new))

    def _reshape(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        time, shape = values[0].time, shapes[0]
        if time is None:
            return _Value(same=frozenset(range(len(out))) if len(values[0].same) == len(shape) else frozenset())
        before, size = prod(shape[:time]), shape[time]
        for dim in range(len(out)):
            if prod(out[:dim]) == before and out[dim] == size:
                return _Value(dim)
        raise _MixedError("reshape")

    def _squeeze(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        return _without("squeeze", values[0], params["dimensions"])

    def _transpose(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        order, value = list(params["permutation"]), values[0]
        time = None if value.time is None else order.index(value.time)
        return _Value(time, frozenset(order.index(dim) for dim in value.same))

    def _concatenate(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        return _kept("concatenate", self.together("concatenate", values, shapes), params["dimension"])

    def _slice(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        value = values[0]
        if value.time is not None and out[value.time] != shapes[0][value.time]:
            raise _MixedError("slice")
        return value

    def _pad(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        if values[0].time is None:
            return _Value()
        return self._slice(params, values, shapes, out)

    def _rev(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        return _kept("rev", values[0], *params["dimensions"])

    def _top_k(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        return _kept("top_k", values[0], len(shapes[0]) - 1)

    def _dot_general(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        contracted, batch = params["dimension_numbers"]
        places: set[int] = set()
        for side in (0, 1):
            time = values[side].time
            if time is None:
                continue
            if time in contracted[side]:
                raise _MixedError("dot_general over the positions")
            if time in batch[side]:
                number = batch[side].index(time)
                other = values[1 - side]
                there = batch[1 - side][number]
                if other.time != there and not (other.time is None and (self.knows or there in other.same)):
                    raise _MixedError("dot_general")
                places.add(number)
                continue
            free = [d for d in range(len(shapes[side])) if d not in contracted[side] and d not in batch[side]]
            first = len(batch[0])
            if side:
                first += len(shapes[0]) - len(contracted[0]) - len(batch[0])
            places.add(first + free.index(time))
        if len(places) > 1:
            raise _MixedError("dot_general of all pairs of positions")
        return _Value(places.pop() if places else None)

    def _gather(self, params: Any, values: Any, shapes: Any, out: tuple[int, ...]) -> _Value:
        operand, indices = values
        numbers = params["dimension_numbers"]
        if operand.time is None and indices.time is None:
            return _Value()
        rows = [dim for dim in range(len(out)) if dim not in numbers.offset_dims]
        if indices.time is None or indices.time >= len(rows):
            raise _MixedError("gather")
        if operand.time is not None:  # each position takes from its own part of the operand
            batching = list(getattr(numbers, "operand_batching_dims", ()))
            if operand.time not in batching:
                raise _MixedError("gather")
            if numbers.start_indices_batching_dims[batching.index(operand.time)] != indices.time:
                raise _MixedError("gather")
        return _Value(rows[indices.time])

    def scan(self, equation: Any, values: list[_Value]) -> list[_Value]:
        """A loop over something else than positions: layers, as a rule."""
        consts, carried = scan_counts(equation)
        [body] = bodies(equation)
        xs = [_without("scan", value, (0,)) for value in values[consts + carried :]]
        carry = values[consts : consts + carried]
        while True:
            found = self.run(body, [*values[:consts], *carry, *xs])
            joined = [_joined(a, b) for a, b in zip(carry, found[:carried], strict=True)]
            if joined == carry:
                break
            carry = joined
        return [*carry, *(_Value(None if v.time is None else v.time + 1) for v in found[carried:])]


def _joined(a: _Value, b: _Value) -> _Value:
    """What is known of a value that is one of two."""
    if a.time != b.time:
        raise _MixedError("scan")
    return _Value(a.time, a.same & b.same)


def _without(name: str, value: _Value, gone: Sequence[int]) -> _Value:
    """What is left of a value when dims are taken out."""
    if value.time in gone:
        raise _MixedError(f"{name} over the positions")

    def moved(dim: int) -> int:
        return dim - sum(other < dim for other in gone)

    time = None if value.time is None else moved(value.time)
    return _Value(time, frozenset(moved(dim) for dim in value.same if dim not in gone))


def _kept(name: str, value: _Value, *dims: int) -> _Value:
    """The value, if an equation that works along these dims leaves positions apart."""
    if value.time in dims:
        raise _MixedError(f"{name} over the positions")
    return _Value(value.time, value.same - set(dims))
