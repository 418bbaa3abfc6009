"""State that has gone on when a backward runs: which of it the backward reads, so that it is kept until then."""

from collections.abc import Sequence

import jax
from jax.extend.core import ClosedJaxpr

from jaxpipe.layout.stages import Part
from jaxpipe.model.context import Context
from jaxpipe.model.loss_weight import depends
from jaxpipe.types import Leaves


def numbers(parts: Sequence[Part], contexts: Sequence[Context]) -> list[int]:
    """The numbers of those leaves of the contexts of some parts that the parts change."""
    found: list[int] = []
    count = 0
    for part, context in zip(parts, contexts, strict=True):
        first = count + len(jax.tree.leaves(context.key))
        changes = () if part.state is None else part.state.changes
        found += [first + number for number, changed in enumerate(changes) if changed]
        count += len(jax.tree.leaves(context))
    return found


def read(backward: ClosedJaxpr, first: int, numbers: Sequence[int]) -> list[int]:
    """Those of some leaves of the contexts that a backward reads; the contexts begin at its argument `first`."""
    return [number for number in numbers if any(depends(backward, [first + number]))]


def replaced(contexts: Sequence[Context], numbers: Sequence[int], values: Leaves) -> Sequence[Context]:
    """The contexts with other values in the place of some of their leaves."""
    leaves, structure = jax.tree.flatten(contexts)
    for number, value in zip(numbers, values, strict=True):
        leaves[number] = value
    return jax.tree.unflatten(structure, leaves)
