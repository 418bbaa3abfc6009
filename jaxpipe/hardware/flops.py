"""Counts the floating-point operations of a step, op by op, from its jaxpr: before any compiler sees it.

Counted are matrix products and convolutions, two operations for each product with its sum. The rest (softmax, norms, the
optimizer) is a few per cent, and chips publish no peak for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxpipe.executor import scopes
from jaxpipe.hardware.structure import Op
from jaxpipe.model.jaxprs import CALLS, bodies, opened


class Flops(NamedTuple):
    """What one device does.

    Attributes:
      ops: per op, of one run of it, its tail included.
      tail: of that what belongs to the tail.
      outside: of a step, outside of all ops.
      shared_tail: of a tail that all ranks run between the ticks, once.
    """

    ops: dict[Op, int]
    tail: dict[Op, int]
    outside: int = 0
    shared_tail: int = 0


def count(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """Counts a traced step.

    A branch that occurs in several phases of the loop is the same in all of them, so the largest one is taken. Loops whose
    number of iterations depends on values count once, and of a conditional the branch that does most.
    """
    jaxpr = opened(jaxpr)
    total = _walk(jaxpr, "", [True] * len(jaxpr.outvars))
    return Flops(total.ops, total.tail, total.here - total.here_tail, total.here_tail)


@dataclass
class _Total:
    """What was counted: of ops that begin inside, and the rest with its tail."""

    here: int = 0
    here_tail: int = 0
    ops: dict[Op, int] = field(default_factory=dict)
    tail: dict[Op, int] = field(default_factory=dict)

    def add(self, other: "_Total", times: int = 1) -> None:
        self.here += times * other.here
        self.here_tail += times * other.here_tail
        for mine, theirs in ((self.ops, other.ops), (self.tail, other.tail)):
            for op, number in theirs.items():
                mine[op] = max(mine.get(op, 0), number)


def _walk(jaxpr: Jaxpr, prefix: str, wanted: Sequence[bool]) -> _Total:
    """Counts what the wanted results need; `prefix` is the name scopes around."""
    total, inside = _Total(), dict[Op, _Total]()
    for equation, outputs in needed(jaxpr, wanted):
        name = f"{prefix}/{equation.source_info.name_stack}"
        part = _equation(equation, name, outputs)
        scope = scopes.read(name)
        begins = scope.kind is not None and scopes.read(prefix).kind is None
        if begins:
            assert scope.kind is not None
            inside.setdefault(Op(scope.kind, scope.program), _Total()).add(part)
        else:
            total.add(part)
    for op, part in inside.items():
        total.add(_Total(ops={op: part.here}, tail={op: part.here_tail}))
    return total


def _equation(equation: JaxprEqn, name: str, outputs: Sequence[bool]) -> _Total:
    own = product(equation)
    if own:
        return _Total(own, own if scopes.read(name).tail else 0)
    primitive, inner = equation.primitive.name, bodies(equation)
    total = _Total()
    if primitive == "cond":
        parts = [_walk(body, name, outputs) for body in inner]
        total.add(max(parts, key=lambda part: part.here))
        return total
    times = equation.params["length"] if primitive == "scan" else 1
    for body in inner:
        same = primitive in CALLS and len(body.outvars) == len(outputs)
        total.add(_walk(body, name, outputs if same else [True] * len(body.outvars)), times)
    return total


def needed(jaxpr: Jaxpr, wanted: Sequence[bool]) -> list[tuple[JaxprEqn, list[bool]]]:
    """The equations that the wanted results need, with the results of theirs that are used."""
    used = {id(var) for var, want in zip(jaxpr.outvars, wanted, strict=True) if want}
    found: list[tuple[JaxprEqn, list[bool]]] = []
    for equation in reversed(jaxpr.eqns):
        outputs = [id(var) in used for var in equation.outvars]
        if any(outputs) or equation.effects:
            used |= {id(var) for var in equation.invars}
            found.append((equation, outputs))
    return found[::-1]


def product(equation: JaxprEqn) -> int:
    """The operations of a product or a convolution; 0 for everything else."""
    primitive, params = equation.primitive.name, equation.params
    if primitive not in ("dot_general", "ragged_dot_general", "ragged_dot", "conv_general_dilated"):
        return 0
    left, right, made = (_dims(var) for var in (*equation.invars[:2], equation.outvars[0]))
    out = math.prod(made)
    if primitive == "conv_general_dilated":
        # Each entry of the result is a sum over the window and over the input features of its group.
        features = params["dimension_numbers"].rhs_spec[0]
        return 2 * out * math.prod(right) // right[features]
    if primitive == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * out * math.prod(left[dim] for dim in contracted)
    return _ragged(left, right, out, params)


def _ragged(left: Sequence[int], right: Sequence[int], out: int, params: dict[str, Any]) -> int:
    """A product whose rows belong to different groups: each row meets the matrix of its own group only."""
    numbers = params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return 2 * out * left[-1]
    (contracted, _), _ = numbers.dot_dimension_numbers
    return 2 * out * math.prod(left[dim] for dim in contracted)


def _dims(var: Any) -> tuple[int, ...]:
    return var.aval.shape
