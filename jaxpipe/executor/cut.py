"""Deals the steps of a backward to two ops: the first makes some results as early as it can, the second one the others.

The first op runs what its results need, and nothing twice that costs anything: what it has made and the second one needs
*crosses*. There is a choice. An elementwise operation can be run again by the second op, if that lets fewer bytes cross.
And a small result, such as the gradient of a bias, can be made early, if what it is made of does not cross anyway. The
least number of bytes is that of a minimal cut (`min_cut.py`). Products, loops and noise are never run twice.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Literal

from jaxpipe.executor.min_cut import Network
from jaxpipe.executor.steps import Step, Trace, size, variables

# `halve(scan, wanted, alive, free)`: a scan as the scan that makes the wanted results, and the one that makes the others
# that are alive, if there are any.
Halve = Callable[[Step, Collection[Any], Collection[Any], Collection[Any]], list[Step]]


@dataclass(frozen=True)
class Cut:
    """The steps of a trace, dealt.

    Attributes:
      first, second: the steps of both ops. Some may be in both.
      crossing: values that the first has and the second one needs.
      early: numbers of those results of the second that the first makes after all.
    """

    first: list[Step]
    second: list[Step]
    crossing: list[Any]
    early: list[int]


def cut(
    trace: Trace,
    first: Sequence[Any],
    second: Sequence[Any],
    free: Collection[Any],
    halve: Halve,
    *,
    later: Collection[Any] = (),
    never_early: Collection[int] = (),
) -> Cut:
    """Deals the steps.

    Args:
      first, second: the results that the ops make.
      free: inputs that the second op has, too.
      halve: cuts scans.
      later: inputs that only the second op has.
      never_early: numbers of results of the second op that the first must not make.
    """
    free = {*free, *trace.constants}
    steps, mine = _scans_halved(trace, first, second, free, halve)
    gratis = set(free)  # what the second op can make of what it has
    reach = mine | (set(trace.inputs) - set(later))  # what the first op has, or could make early
    for step in steps:
        if step.again is not None and gratis.issuperset(step.inputs):
            gratis.update(step.outputs)
        elif step.again is not None and all(v in reach or v in gratis for v in step.inputs):
            reach.update(step.outputs)
    reach -= gratis
    network: Network[Any] = Network()
    ends = variables(second)
    fixed = {v for n, v in enumerate(second) if n in never_early and not isinstance(v, Literal)}
    alive = _needed(steps, ends)[1]
    for value in trace.inputs:
        if value in reach:
            network.value(value, size(value))
            network.made(value)
    for step in steps:
        inputs, outputs = [v for v in step.inputs if v in reach], [v for v in step.outputs if v in reach]
        for value in outputs:
            network.value(value, size(value))
            if step.again is None:
                network.made(value)
            for source in inputs if step.again is not None else ():
                network.follows(value, source)
        if not outputs and step in alive:
            for value in inputs:
                network.needed(value)
    for value in fixed & reach:
        network.needed(value)
    crossing = network.cut()

    # A result that the second op can make of what it gets, it makes, unless the first has it anyway.
    gets = {*free, *crossing, *later}
    makes = set(gets)
    for step in steps:
        if (step.again is not None or not reach.intersection(step.outputs)) and makes.issuperset(step.inputs):
            makes.update(step.outputs)
    early = [
        n
        for n, v in enumerate(second)
        if not isinstance(v, Literal) and v not in gets | fixed and (v in mine or v not in makes)
    ]
    wanted = [*first, *crossing, *(second[n] for n in early)]
    effects = [step for step in steps if step.effect]
    first_steps = _needed(steps, variables(wanted), effects=effects, has=set(trace.inputs))[1]
    late = [v for n, v in enumerate(second) if n not in early]
    missing, second_steps = _needed(steps, variables(late), has=gets)
    twice = [step for step in second_steps if step.again is None and not reach.isdisjoint(step.outputs)]
    assert not missing - gets and not twice, "the second op needs what it has not got"
    missing = _needed(first_steps, variables(wanted), effects=effects)[0]
    assert missing.isdisjoint(later), "the first op needs what it has not got"
    return Cut(first_steps, second_steps, crossing, early)


def _scans_halved(
    trace: Trace, first: Sequence[Any], second: Sequence[Any], free: Collection[Any], halve: Halve
) -> tuple[list[Step], set[Any]]:
    """The steps that anything needs, scans cut where the first results need some of what they make; and what the steps that
    the first results need make."""
    effects = [step for step in trace.steps if step.effect]
    alive = {v for step in _needed(trace.steps, variables([*first, *second]), effects=effects)[1] for v in step.inputs}
    alive |= {*variables(first), *variables(second)}
    need, steps, mine = set(variables(first)), list[Step](), set[Any]()
    for step in reversed(trace.steps):
        wanted = need.intersection(step.outputs)
        if not step.effect and alive.isdisjoint(step.outputs):
            continue
        if not wanted and not step.effect:
            steps.append(step)
            continue
        halves = [step]
        if step.equation is not None:
            halves = halve(step, wanted, alive.intersection(step.outputs), free)
        steps += reversed(halves)
        mine.update(halves[0].outputs)
        need.update(halves[0].inputs)
    return steps[::-1], mine


def _needed(
    steps: Sequence[Step], values: Collection[Any], effects: Collection[Step] = (), has: Collection[Any] = ()
) -> tuple[set[Any], list[Step]]:
    """The steps that make some values of what is there, and all values that are read of what is there or is missing."""
    need = {value for value in values if value not in has}
    read, found = {value for value in values if value in has}, list[Step]()
    for step in reversed(steps):
        if need.isdisjoint(step.outputs) and step not in effects:
            continue
        found.append(step)
        need.difference_update(step.outputs)
        for value in step.inputs:
            (read if value in has else need).add(value)
    return need | read, found[::-1]
