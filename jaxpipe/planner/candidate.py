"""One way to train: a mesh, a schedule and settings, before anything is known about it."""

from typing import NamedTuple


class Mesh(NamedTuple):
    """The sizes of the mesh axes."""

    pipe: int
    data: int
    model: int = 1

    @property
    def size(self) -> int:
        """How many chips it takes."""
        return self.pipe * self.data * self.model


class Candidate(NamedTuple):
    """One way to train.

    Attributes:
      chunks: stages per rank.
      micro_batches: M.
      rows: of a micro-batch on one data rank.
      remat: a mode of `Config.remat`.
      zero: the `Config.zero_stage`.
    """

    mesh: Mesh
    schedule: str
    chunks: int
    micro_batches: int
    rows: int
    remat: str
    zero: int

    @property
    def num_stages(self) -> int:
        """Of all ranks."""
        return self.mesh.pipe * self.chunks

    @property
    def keeps(self) -> str:
        """What layers keep; see `trace.KEEPS`."""
        return "layer" if self.remat == "stage" else self.remat
