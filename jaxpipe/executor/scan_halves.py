"""Cuts a scan in two: the first makes the results that are wanted early, and stacks what the second one needs of it.

The backward of repeated layers is a scan, which carries the gradient of the activations and makes those of the weights. As
one operation all of it would have to run in the first op. Its body is cut as everything else is (`cut.py`), where

- what is carried on to a wanted result belongs to the first, and so does what that needs, until nothing more is found;
- what crosses in the body is stacked over the iterations by the first scan, and scanned over by the second one;
- a gradient that is summed up in the carry is carried by the second scan alone.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from jaxpipe.executor.cut import Cut, cut
from jaxpipe.executor.steps import Step, Trace, Value, run, trace_of, variables
from jaxpipe.model.jaxprs import scan_counts
from jaxpipe.types import Leaves


def halve(scan: Step, wanted: Collection[Any], alive: Collection[Any], free: Collection[Any]) -> list[Step]:
    """The scan that makes the wanted results, and the one that makes the others that are alive, if there are any.

    Args:
      scan: a step whose equation is a scan.
      wanted, alive: some of its outputs.
      free: values that the second op has anyway.
    """
    assert scan.equation is not None
    return _Scan(scan.equation).halves(wanted, alive, free)


class _Scan:
    """A scan, and the trace of its body."""

    def __init__(self, equation: JaxprEqn):
        self.equation, self.params = equation, equation.params
        self.body: Trace = trace_of(equation.params["jaxpr"])
        self.num_constants, self.num_carry = scan_counts(equation)
        self.constants = list(zip(self.body.inputs[: self.num_constants], equation.invars, strict=False))
        first = self.num_constants + self.num_carry
        self.slices = list(zip(self.body.inputs[first:], equation.invars[first:], strict=True))
        self.carry = list(range(self.num_carry))

    def halves(self, wanted: Collection[Any], alive: Collection[Any], free: Collection[Any]) -> list[Step]:
        outer, inner = self.equation.outvars, self.body.outputs
        used = self._closed({n for n in self.carry if outer[n] in alive}, alive)
        mine = self._closed({n for n in self.carry if outer[n] in wanted}, wanted)
        slices = range(self.num_carry, len(outer))
        early = [n for n in slices if outer[n] in wanted]
        first = [*sorted(mine), *early]
        second = [n for n in (*sorted(used), *slices) if n not in first and (n in used or outer[n] in alive)]
        found = cut(
            self.body,
            [inner[n] for n in first],
            [inner[n] for n in second],
            [inside for inside, _ in self.constants] + [inside for inside, outside in self.slices if outside in free],
            halve,
            later=[self._carried(n) for n in self.carry if n not in mine],
            never_early=[number for number, n in enumerate(second) if n in used],
        )
        moved = [second[number] for number in found.early]
        second = [n for n in second if n not in moved]
        # Slices of what the scan is given can be taken again.
        given = {inside for inside, _ in self.slices}
        stacked = [(value, Value(self._stacked(value))) for value in found.crossing if value not in given]
        made = [*[(inner[n], outer[n]) for n in (*early, *moved)], *stacked]
        halves = [self._scan(found.first, sorted(mine), made, self.slices)]
        if second:
            rest = [(inner[n], outer[n]) for n in second if n >= self.num_carry]
            halves.append(
                self._scan(found.second, [n for n in second if n < self.num_carry], rest, self.slices + stacked)
            )
        return halves

    def _carried(self, number: int) -> Any:
        return self.body.inputs[self.num_constants + number]

    def _stacked(self, value: Any) -> Any:
        return jax.ShapeDtypeStruct((self.params["length"], *value.aval.shape), value.aval.dtype)

    def _closed(self, carry: set[int], outputs: Collection[Any]) -> set[int]:
        """The numbers of what has to be carried for some of it, and for those of the stacked outputs that are named."""
        inner, outer = self.body.outputs, self.equation.outvars
        ends = [inner[n] for n in range(self.num_carry, len(outer)) if outer[n] in outputs]
        while True:
            values = variables([*[inner[n] for n in carry], *ends])
            needs = _inputs_of(self.body, values)
            more = {n for n in self.carry if self._carried(n) in needs} | carry
            if more == carry:
                return carry
            carry = more

    def _scan(
        self,
        steps: Sequence[Step],
        carry: Sequence[int],
        made: Sequence[tuple[Any, Any]],
        slices: Sequence[tuple[Any, Any]],
    ) -> Step:
        """A scan over some steps of the body.

        Args:
          carry: the numbers of what it carries.
          made: of what it stacks, the values inside and outside.
          slices: the same of what it could scan over.
        """
        inner, outer, params = self.body.outputs, self.equation.outvars, self.params
        read = {value for step in steps for value in step.inputs}
        read |= set(variables([*[inner[n] for n in carry], *[inside for inside, _ in made]]))
        constants = [(inside, outside) for inside, outside in self.constants if inside in read]
        slices = [(inside, outside) for inside, outside in slices if inside in read]
        starts = [self.equation.invars[self.num_constants + n] for n in carry]
        inputs = variables([outside for _, outside in constants] + starts + [outside for _, outside in slices])

        def run_scan(values: Leaves) -> Leaves:
            get = run([], dict(zip(inputs, values, strict=True)))
            known = {inside: get(outside) for inside, outside in constants} | dict(self.body.constants)

            def one(state: Leaves, given: Leaves) -> tuple[Leaves, Leaves]:
                here = dict(zip([self._carried(n) for n in carry], state, strict=True))
                here |= dict(zip([inside for inside, _ in slices], given, strict=True))
                found = run(steps, {**known, **here})
                return [found(inner[n]) for n in carry], [found(inside) for inside, _ in made]

            over = [get(outside) for _, outside in slices]
            length, reverse, unroll = params["length"], params["reverse"], params["unroll"]
            start = [get(value) for value in starts]
            state, stacks = jax.lax.scan(one, start, over, length=length, reverse=reverse, unroll=unroll)
            return [*state, *stacks]

        outputs = [outer[n] for n in carry] + [outside for _, outside in made]
        return Step(tuple(inputs), tuple(outputs), run_scan)


def _inputs_of(trace: Trace, values: Collection[Any]) -> set[Any]:
    """The inputs that some values need; a scan inside is not cut for this."""
    need = set(values)
    for step in reversed(trace.steps):
        if not need.isdisjoint(step.outputs):
            need.update(step.inputs)
    return need.intersection(trace.inputs)


__all__ = ["Cut", "halve"]
