"""Gradients of what passes between units and stages: a list with one entry per inexact leaf of the value, in order.

The entry is None where nobody needs the gradient, because no weight is behind that leaf (`model/dependence.py`). Flags say
which ones are needed; no flags at all mean every one.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.model.shapes import aval, is_inexact
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Tree

Leaf = TypeVar("Leaf")


def needed(leaves: Sequence[Leaf], flags: Sequence[bool]) -> list[Leaf | None]:
    """The leaves, None in the place of those that are not needed."""
    if not flags:
        return list(leaves)
    return [leaf if flag else None for leaf, flag in zip(leaves, flags, strict=True)]


def spread(gradients: Sequence[Leaf], flags: Sequence[bool]) -> list[Leaf | None]:
    """The inverse: gradients of the leaves that are needed, with None for the others."""
    if not flags:
        return list(gradients)
    given = iter(gradients)
    return [next(given) if flag else None for flag in flags]


def fitted(gradients: Sequence[Any], flags: Sequence[bool], like: Sequence[Any]) -> list[Any]:
    """Gradients as somebody wants them who needs those of `flags`: zeros where there are none, None where none is wanted.

    Args:
      like: abstract values of the leaves, or arrays.
    """
    full = [jnp.zeros(a.shape, a.dtype) if g is None else g for g, a in zip(gradients, like, strict=True)]
    return needed(full, flags)


def leaves(gradients: Sequence[Any]) -> list[jax.Array]:
    """Those that are there."""
    return [g for g in gradients if g is not None]


def replaced(leaves: Sequence[Leaf], by: Sequence[Leaf], flags: Sequence[bool]) -> list[Leaf]:
    """The leaves, with those that are needed replaced, in order."""
    return [old if new is None else new for old, new in zip(leaves, spread(by, flags), strict=True)]


def inexact(outputs: Avals) -> list[jax.ShapeDtypeStruct]:
    """Abstract values of the inexact leaves."""
    return [aval(leaf) for leaf in split_inexact(outputs)[0]]


def cotangents(outputs: Tree, values: Sequence[jax.Array | None]) -> Tree:
    """A cotangent tree for `outputs` from those of its inexact leaves, zeros for None; integers get JAX's float0."""
    leaves, structure = jax.tree.flatten(outputs)
    given = iter(values)
    full = [next(given) if is_inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    full = [jnp.zeros(leaf.shape, leaf.dtype) if a is None else a for a, leaf in zip(full, leaves, strict=True)]
    return jax.tree.unflatten(structure, full)
