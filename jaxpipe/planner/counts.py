"""What a traced function costs, equation by equation: operations, bytes that pass the memory, and sums over an axis.

Products, convolutions, reductions, gathers, scatters and sorts read their operands from memory and write their results;
everything else is taken to be fused with one of these, as compilers do it. Each equation takes as long as its operations or
its bytes take, whichever is longer: the roofline of Williams, Waterman and Patterson (2009).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxpipe.hardware.flops import needed, product
from jaxpipe.model.jaxprs import CALLS, bodies, opened, scan_counts
from jaxpipe.planner.cuts import WHOLE, Cut, is_cut, through

# Equations that are no products, and pass the memory all the same.
_PASSES = ("gather", "scatter", "sort", "cumsum", "cumlogsumexp", "cummax", "top_k", "dynamic_update_slice", "reduce_")
_READ_ONLY = "reduce_"  # the result is small, or fused with what reads it


class Term(NamedTuple):
    """The cost of one equation on one device of the axis that cuts it.

    Attributes:
      flops: operations of products.
      bytes: between the chip and its memory.
      summed: bytes of a result that is a sum over the axis.
    """

    flops: float
    bytes: float
    summed: float = 0.0

    def times(self, number: float) -> "Term":
        """So many of them."""
        return Term(self.flops * number, self.bytes * number, self.summed * number)


def count(
    jaxpr: ClosedJaxpr | Jaxpr, cuts: Sequence[Cut] = (), size: int = 1, wanted: Sequence[bool] | None = None
) -> tuple[list[Term], list[Cut]]:
    """The costs of the equations that the wanted results need, in order; and how the results are cut.

    A conditional costs what its dearest branch does, and a loop that ends by a value is counted once.

    Args:
      cuts: of each input, how it is cut over an axis; () if nothing is.
      size: the devices of that axis.
      wanted: for each result, whether it is needed; None: all.
    """
    jaxpr = opened(jaxpr)
    given = list(cuts) or [WHOLE] * len(jaxpr.invars)
    return _Counter(size).walk(jaxpr, given, wanted or [True] * len(jaxpr.outvars))


class _Counter:
    def __init__(self, size: int):
        self.size = size

    def walk(self, jaxpr: Jaxpr, cuts: Sequence[Cut], wanted: Sequence[bool]) -> tuple[list[Term], list[Cut]]:
        """The terms of a body, and how its results are cut."""
        known: dict[int, Cut] = {id(var): cut for var, cut in zip(jaxpr.invars, cuts, strict=True)}
        found: list[Term] = []
        for equation, outputs in needed(jaxpr, wanted):
            operands = [known.get(id(var), WHOLE) for var in equation.invars]
            terms, results = self._equation(equation, operands, outputs)
            found += terms
            known |= {id(var): cut for var, cut in zip(equation.outvars, results, strict=True)}
        return found, [known.get(id(var), WHOLE) for var in jaxpr.outvars]

    def _equation(self, equation: JaxprEqn, cuts: list[Cut], outputs: Sequence[bool]) -> tuple[list[Term], list[Cut]]:
        name, inner = equation.primitive.name, bodies(equation)
        if not inner or name.startswith(("reduce", "scatter", "arg", "sort", "cum")):
            results, summed = through(equation, cuts)
            return self._term(equation, cuts, results, summed), results
        if name == "scan":
            return self._scan(equation, inner[0], cuts)
        if name == "cond":
            walks = [self._body(body, cuts[1:], outputs) for body in inner]
            return max(walks, key=lambda walk: sum(term.flops for term in walk[0]))
        terms, results = self._body(inner[-1], cuts, outputs if name in CALLS else None)
        fits = len(results) == len(equation.outvars)
        return terms, results if fits else [None if any(map(is_cut, cuts)) else WHOLE] * len(equation.outvars)

    def _body(self, body: Jaxpr, cuts: Sequence[Cut], outputs: Sequence[bool] | None) -> tuple[list[Term], list[Cut]]:
        given = cuts[-len(body.invars) :] if body.invars else []
        given = [*given, *[WHOLE] * (len(body.invars) - len(given))]
        same = outputs is not None and len(outputs) == len(body.outvars)
        return self.walk(body, given, list(outputs or ()) if same else [True] * len(body.outvars))

    def _scan(self, equation: JaxprEqn, body: Jaxpr, cuts: list[Cut]) -> tuple[list[Term], list[Cut]]:
        consts, carried = scan_counts(equation)
        inside = [*cuts[: consts + carried], *(_moved(cut, -1) for cut in cuts[consts + carried :])]
        terms, results = self.walk(body, inside, [True] * len(body.outvars))
        made = [*results[:carried], *(_moved(cut, 1) for cut in results[carried:])]
        return [term.times(equation.params["length"]) for term in terms], made

    def _term(self, equation: JaxprEqn, cuts: list[Cut], results: list[Cut], summed: bool) -> list[Term]:
        flops, name = product(equation), equation.primitive.name
        if not flops and not name.startswith(_PASSES):
            return []
        parts = self.size if any(map(is_cut, [*cuts, *results])) else 1
        passed = sum(map(self._part, equation.invars, cuts))
        if flops or not name.startswith(_READ_ONLY):
            passed += sum(map(self._part, equation.outvars, results))
        if name == "gather":  # it reads what it takes, and not the whole table
            passed = 2 * sum(map(self._part, equation.outvars, results))
        return [Term(flops / parts, passed, sum(map(_bytes, equation.outvars)) if summed else 0.0)]

    def _part(self, var: Any, cut: Cut) -> float:
        return _bytes(var) / (self.size if is_cut(cut) else 1)


def _moved(cut: Cut, by: int) -> Cut:
    return None if cut is None or (by < 0 and 0 in cut) else frozenset(dim + by for dim in cut)


def _bytes(var: Any) -> int:
    aval = var.aval
    return math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
