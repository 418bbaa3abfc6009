"""A derivative that reads the weights as other operands than the function does.

A product with a weight may want it laid out one way, the product with its transpose the other way. If both read the same
operand of the compiled loop, XLA's TPU compiler gives that operand one of the two layouts, and copies the weight for the
other use: the slice of each layer in each backward, or the whole stack in each tick. With an operand each, it lays out
each once, before the loop, and keeps one array where the layouts agree. CPU and GPU have one layout for all.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax

from jaxpipe.model.capture import capture
from jaxpipe.model.shapes import avals
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Leaves, Params, Tree


class Twice(NamedTuple):
    """What a rank holds, as two operands of the compiled loop.

    Attributes:
      params: for forwards, and for those that a backward runs again.
      again: the same values, for derivatives, and for the tail, which only backwards run: a head shares its array with an
        embedding (`owned_places`), and wants it laid out the other way.
    """

    params: Params
    again: Params

    @classmethod
    def of(cls, held: Params) -> "Twice":
        """Two operands of what is one array wherever XLA gives both the same layout: behind the barrier it cannot tell."""
        leaves, rebuild = split_inexact(held)
        both = jax.lax.optimization_barrier((leaves, leaves))
        return cls(*map(rebuild, both))


def vjp(
    function: Callable[[Leaves, Leaves], Tree],
    params: Leaves,
    x: Leaves,
    again: Leaves,
    frozen: Collection[int] = (),
) -> tuple[Tree, Callable[[Tree], tuple[Leaves, Leaves]]]:
    """`jax.vjp(function, params, x)`, with a pullback that reads `again` wherever it would read one of `params`.

    Args:
      again: the values of `params` once more.
      frozen: the numbers of params that get no gradient; those of the others are what the pullback returns.
    """

    def differentiated(params: Leaves, x: Leaves) -> tuple[Tree, Callable[[Tree], tuple[Leaves, Leaves]]]:
        return jax.vjp(*of_trained(function, params, frozen), x)

    captured = capture(differentiated, avals(params), avals(x))
    y, pullback = captured(params, x)
    leaves, structure = jax.tree.flatten(pullback)
    for number, source in enumerate(captured.sources(len(jax.tree.leaves(y)))):
        if source.argument is not None and source.argument < len(again):
            leaves[number] = again[source.argument]
    return y, jax.tree.unflatten(structure, leaves)


def of_trained(
    function: Callable[[Leaves, Leaves], Tree], params: Leaves, frozen: Collection[int]
) -> tuple[Callable[[Leaves, Leaves], Tree], Leaves]:
    """A function of some params and an input as one of those params that are not frozen; and these params."""
    chosen = [i for i in range(len(params)) if i not in frozen]

    def of_chosen(values: Leaves, x: Leaves) -> Tree:
        whole = list(params)
        for i, value in zip(chosen, values, strict=True):
            whole[i] = value
        return function(whole, x)

    return of_chosen, [params[i] for i in chosen]
