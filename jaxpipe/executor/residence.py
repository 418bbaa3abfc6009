"""`Residence`: how a rank holds one group of the params tree while a step runs.

Stored params are cut over the ranks, so that weights and optimizer state shrink with their number. What a rank computes
with is made from them once per step (`enter`), read and added to by the ops (`take`, `add`), and turned back into gradients
of what is stored (`leave`). Each way of doing that is a subclass; `executor/weights.py` puts them together.
"""

import abc
from typing import Any, Generic, TypeVar

import jax
from jax.sharding import Mesh

from jaxpipe.model.layout import Shared, Stack
from jaxpipe.model.stages import Part
from jaxpipe.types import Avals, Params

Entry = TypeVar("Entry", Stack, Shared)
# Which repetition of a unit: an index, or a traced int32 inside of a scan.
Repeat = Any


class Residence(abc.ABC, Generic[Entry]):
    """How a rank holds the entries of one group.

    Args:
      entries: by name.
      mesh: the devices.
    """

    def __init__(self, entries: dict[str, Entry], mesh: Mesh):
        self.entries, self.mesh = entries, mesh

    @abc.abstractmethod
    def avals(self, entry: Entry) -> Avals:
        """Abstract values of what a rank holds of an entry."""

    @abc.abstractmethod
    def enter(self, entry: Entry, stored: Params) -> Params:
        """What a rank holds, from its part of what is stored."""

    @abc.abstractmethod
    def take(self, held: Params, part: Part, repeat: Repeat) -> Params:
        """The params that repetition `repeat` of a part computes with; a leading dim of `part.count` if that is not 1."""

    @abc.abstractmethod
    def add(self, sums: jax.Array, part: Part, repeat: Repeat, gradient: jax.Array) -> jax.Array:
        """One leaf of the gradients of what a rank holds, with the gradient of one repetition added in place."""

    @abc.abstractmethod
    def leave(self, entry: Entry, gradients: Params) -> Params:
        """The transpose of `enter`: from the gradients of what a rank holds to its part of those of what is stored."""
