"""Counts the shapes of batches, each of which compiles a program of its own, and warns where there are many."""

import warnings
from typing import Any

import jax
from jax.core import Tracer

from jaxpipe.model.shapes import describe, signature
from jaxpipe.types import Tree

MOST = 8  # so many are taken for a choice; more are taken for an accident

PAD = (
    "Pad them to a few shapes: jaxpipe.pad_micro_batches(..., multiple_of=64), with weights that keep the loss exact. The "
    "shapes (inputs, labels) are"
)


class ShapesSeen:
    """The shapes of the batches of one kind.

    Args:
      what: the kind, as the warning calls it, such as "training".
      advice: what to do about it, one or more sentences.
    """

    def __init__(self, what: str, advice: str = PAD):
        self.what, self.advice = what, advice
        self._seen: dict[Any, str] = {}
        self._warned = False

    def add(self, batch: Tree) -> None:
        """Notes the shapes of a batch, in training leaves [M, B, ...]. Beyond the eighth, it warns once."""
        if self._warned or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(batch)):
            return
        shapes = signature(batch)
        if shapes in self._seen:
            return
        self._seen[shapes] = describe(batch)
        if len(self._seen) <= MOST:
            return
        self._warned = True
        listed = "\n".join(f"  {text}" for text in self._seen.values())
        warnings.warn(
            f"{len(self._seen)} shapes of {self.what} batches so far. Each one compiles a program of its own, which takes "
            f"far longer than a step, and stays in memory. {self.advice}\n{listed}",
            stacklevel=3,
        )
