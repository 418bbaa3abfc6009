"""The backward of a unit as two functions: the first gives the gradient of the input, the second those of the weights."""

from collections.abc import Sequence

import jax

from jaxpipe.executor.cut import cut
from jaxpipe.executor.scan_halves import halve
from jaxpipe.executor.steps import run, trace_of
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.shapes import aval
from jaxpipe.types import Leaves


class Halves:
    """A captured function, cut.

    Args:
      whole: the function.
      weights: the numbers of those results, flat, that can wait.
      again: of each argument, flat, whether the second half is given it, too.

    Attributes:
      pending: abstract values of what the first half keeps for the second one.
      early: of each result in `weights`, whether the first half gives it: its work cannot be taken apart from that of the
        other results, or it is small, and would keep more waiting than it is worth.
    """

    def __init__(self, whole: Captured, weights: Sequence[int], again: Sequence[bool]):
        trace = trace_of(whole.jaxpr)
        arguments = [aval(leaf) for leaf in (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in trace.inputs)]
        now = [number for number in range(len(trace.outputs)) if number not in set(weights)]
        results = [trace.outputs[number] for number in now]
        gradients = [trace.outputs[number] for number in weights]
        free = [value for value, is_free in zip(trace.inputs, again, strict=True) if is_free]
        found = cut(trace, results, gradients, free, halve)
        self.early = [number in found.early for number in range(len(gradients))]
        self.pending = [aval(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)) for v in found.crossing]
        self._again, self._now, self._count = list(again), now, len(trace.outputs)

        def first(arguments: Leaves) -> tuple[Leaves, Leaves, Leaves]:
            read = run(found.first, {**trace.constants, **dict(zip(trace.inputs, arguments, strict=True))})
            some = [read(gradients[number]) for number in found.early]
            return [read(value) for value in results], some, [read(value) for value in found.crossing]

        def second(known: Leaves, pending: Leaves) -> Leaves:
            given = {**dict(zip(free, known, strict=True)), **dict(zip(found.crossing, pending, strict=True))}
            read = run(found.second, {**trace.constants, **given})
            return [read(value) for value, early in zip(gradients, self.early, strict=True) if not early]

        self._first = capture(first, arguments)
        self._second = capture(
            second, [a for a, is_free in zip(arguments, again, strict=True) if is_free], self.pending
        )

    def first(self, arguments: Leaves) -> tuple[Leaves, list[jax.Array | None], Leaves]:
        """The results that cannot wait, of the others those that are early (None for the rest), and what is pending."""
        results, some, pending = self._first(arguments)
        given = iter(some)
        return results, [next(given) if early else None for early in self.early], pending

    def second(self, known: Sequence[jax.Array | None], pending: Leaves) -> list[jax.Array | None]:
        """The results that are not early, None for the others.

        Args:
          known: all arguments, flat. Those that the second half is not given are not looked at.
        """
        given = iter(self._second([leaf for leaf, is_free in zip(known, self._again, strict=True) if is_free], pending))
        return [None if early else next(given) for early in self.early]
