"""Which dims of an array are cut over which axes of the mesh."""

from dataclasses import dataclass

from jax.sharding import PartitionSpec


@dataclass(frozen=True)
class Placement:
    """Where the parts of one array lie. Along axes that are not named, every device holds the same.

    Attributes:
      cuts: (mesh axis, dim of the array that is cut over it) pairs.
    """

    cuts: tuple[tuple[str, int], ...] = ()

    def dim(self, axis: str) -> int | None:
        """The dim that is cut over a mesh axis, or None."""
        return next((dim for name, dim in self.cuts if name == axis), None)

    @property
    def spec(self) -> PartitionSpec:
        """The same for JAX, written as a compiled step writes it: nothing behind the last cut dim."""
        axes: list[str | None] = [None] * (1 + max((dim for _, dim in self.cuts), default=-1))
        for axis, dim in self.cuts:
            axes[dim] = axis
        return PartitionSpec(*axes)
