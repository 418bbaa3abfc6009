"""Which params of some parts of a stage are trained: derivatives are taken by these alone."""

from collections.abc import Callable, Sequence

import jax

from jaxpipe.layout.stages import Part
from jaxpipe.model.shapes import is_inexact
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Leaves, Params


def split_trained(parts: Sequence[Part], params: Sequence[Params]) -> tuple[Leaves, Callable[[Leaves], list[Params]]]:
    """The leaves of the params of some parts that are trained, and the function that puts such leaves back."""
    frozen, start = set[int](), 0
    for part, held in zip(parts, params, strict=True):
        frozen |= {start + number for number in part.frozen}
        start += len(jax.tree.leaves(held))
    return split_inexact(list(params), frozen)


def frozen_numbers(parts: Sequence[Part], params: Sequence[Params]) -> frozenset[int]:
    """The numbers of those that are frozen among the leaves of the params of some parts that have derivatives."""
    found: list[bool] = []
    for part, held in zip(parts, params, strict=True):
        leaves = jax.tree.leaves(held)
        found += [number in part.frozen for number, leaf in enumerate(leaves) if is_inexact(leaf)]
    return frozenset(number for number, is_frozen in enumerate(found) if is_frozen)
