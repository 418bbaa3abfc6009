"""`Share`: which rows of a micro-batch each process brings."""

import functools
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jaxpipe.mesh import data_ranks_of, data_size
from jaxpipe.processes.group import Group
from jaxpipe.processes.rows import rows_of_process


@dataclass(frozen=True)
class Share:
    """What a process brings of each micro-batch: all of it, or only the rows of its own data ranks.

    Attributes:
      mesh: the devices.
      local: whether a process brings its own rows only.

    Raises:
      MeshError: `local`, and the rows of a process are not one slice.
    """

    mesh: Mesh
    local: bool = False

    def __post_init__(self):
        if self.local:
            for process in self.group.members:
                rows_of_process(self.mesh, data_size(self.mesh), process)

    @property
    def group(self) -> Group:
        """The processes of the mesh."""
        return Group.of(self.mesh)

    @functools.cached_property
    def mine(self) -> tuple[int, ...]:
        """The data ranks whose rows this process brings."""
        return self.of(jax.process_index())

    def of(self, process: int) -> tuple[int, ...]:
        """The data ranks whose rows a process brings."""
        return data_ranks_of(self.mesh, process) if self.local else tuple(range(data_size(self.mesh)))

    @property
    def ranks(self) -> int:
        """The number of data ranks over which the rows are split that this process brings."""
        return len(self.mine)

    def whole(self, rows: int) -> int:
        """The rows of a micro-batch of which this process brings so many."""
        return rows * data_size(self.mesh) // self.ranks

    def first(self, rows: int) -> int:
        """Which row of the micro-batch is the first one of those, if this process brings so many."""
        return self.mine[0] * rows // self.ranks

    @functools.cached_property
    def alike(self) -> list[int]:
        """For each process of the group, the place in the group of the first one that brings the same rows."""
        shares = [self.of(process) for process in self.group.members]
        return [shares.index(share) for share in shares]

    @property
    def rule(self) -> str:
        """What each process yields, as a sentence for messages."""
        if self.local:
            return (
                "With local_rows=True each process yields the rows of its own data ranks, of equally many micro-batches; "
                "processes with the same data ranks yield the same."
            )
        return "Every process yields the same whole micro-batches, or with Config(local_rows=True) only its own rows."
