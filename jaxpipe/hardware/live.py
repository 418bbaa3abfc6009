"""How many bytes a jaxpr holds at once, op by op in its order, before a compiler fuses anything: a bound for its work.

A value lives from the equation that makes it to the last one that reads it. Where XLA can work in place, so does the count:
updates of a part of an array, the carry of loops, and elementwise operations on an operand that nobody reads again.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxpipe.executor import scopes
from jaxpipe.hardware.flops import needed
from jaxpipe.hardware.structure import Op
from jaxpipe.model.jaxprs import CALLS, bodies, opened

# Their first operand is changed in place, also if it came from outside.
_UPDATES = frozenset({"scatter", "scatter-add", "scatter_add", "dynamic_update_slice"})
_LOOPS = frozenset({"while", "scan"})
# Their results look the same in memory as an operand.
_VIEWS = frozenset({"reshape", "squeeze", "expand_dims", "optimization_barrier", "stop_gradient", "copy"})
# Their results are as large as an operand, and cannot take its place all the same.
_MIX = frozenset(
    {"dot_general", "conv_general_dilated", "transpose", "gather", "sort", "rev", "cumsum", "ragged_dot_general"}
)


def work(jaxpr: ClosedJaxpr | Jaxpr) -> dict[Op, int]:
    """For each op of a traced step, the bytes of what it makes while it runs, at most at once."""
    found: dict[Op, int] = {}
    for op, body in _ops(opened(jaxpr), ""):
        found[op] = max(found.get(op, 0), peak(body))
    return found


def _ops(jaxpr: Jaxpr, prefix: str) -> Iterator[tuple[Op, Jaxpr]]:
    """The bodies of branches: those whose equations carry the scope of an op that their surroundings do not."""
    for equation in jaxpr.eqns:
        name = f"{prefix}/{equation.source_info.name_stack}"
        if equation.primitive.name != "while" and scopes.read(name).kind is not None:
            scope = scopes.read(name)
            assert scope.kind is not None
            yield Op(scope.kind, scope.program), jaxpr
            return
    for equation in jaxpr.eqns:
        for body in bodies(equation):
            yield from _ops(body, f"{prefix}/{equation.source_info.name_stack}")


def peak(jaxpr: Jaxpr, wanted: Sequence[bool] | None = None) -> int:
    """The most bytes that are alive at once of what the equations make; what comes in from outside is not counted.

    Args:
      wanted: which results are used; None: all.
    """
    equations = needed(jaxpr, wanted or [True] * len(jaxpr.outvars))
    last = {id(var): len(equations) for var in jaxpr.outvars}
    for number, (equation, _) in reversed(list(enumerate(equations))):
        for var in equation.invars:
            last.setdefault(id(var), number)
    alive: dict[int, int] = {}
    most = 0
    for number, (equation, outputs) in enumerate(equations):
        dying = {id(var): alive[id(var)] for var in equation.invars if last[id(var)] == number and id(var) in alive}
        calls = equation.primitive.name in CALLS
        inner = max((peak(body, outputs if calls else None) for body in bodies(equation)), default=0)
        made = {id(v): _bytes(v) for v, used in zip(equation.outvars, outputs, strict=True) if used}
        free = _in_place(equation, dying)
        for var, size in list(made.items()):
            taken = next((other for other, room in free.items() if room >= size), None)
            if taken is not None:
                del free[taken]
                alive.pop(taken, None)  # its place goes on under another name
                if taken not in dying:
                    made[var] = 0  # of a place outside
        total = sum(made.values())
        most = max(most, sum(alive.values()) + (max(total, inner) if calls else total + inner))
        alive |= made
        for var in dying:
            alive.pop(var, None)
    return most


def _in_place(equation: JaxprEqn, dying: dict[int, int]) -> dict[int, int]:
    """Places that results may take: the bytes of each, by operand."""
    name = equation.primitive.name
    if name in _UPDATES:
        return {id(equation.invars[0]): _bytes(equation.invars[0])}
    if name in _LOOPS:
        return {id(var): _bytes(var) for var in equation.invars}
    if name in _VIEWS:
        return {id(var): _bytes(var) for var in equation.invars}
    return {} if name in _MIX or name.startswith("reduce") else dict(dying)


def _bytes(var: Any) -> int:
    aval = var.aval
    return math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
