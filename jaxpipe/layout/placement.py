"""Which dims of an array are cut over which axes of the mesh, and which are padded for that."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxpipe.mesh import DATA, PIPE
from jaxpipe.types import Shape

# The axes that the compiled loop handles itself. Where several axes cut one dim, these come first: JAX wants it so.
_MANUAL = (PIPE, DATA)


@dataclass(frozen=True)
class Placement:
    """Where the parts of one array lie. Along axes that are not named, every device holds the same.

    Attributes:
      cuts: (mesh axis, dim of the array that is cut over it) pairs. Several axes may cut one dim.
      padded: (dim, size that is stored) pairs, for dims that are longer in storage than in the array, with zeros at the
        end, so that the devices have equal parts.
    """

    cuts: tuple[tuple[str, int], ...] = ()
    padded: tuple[tuple[int, int], ...] = ()

    def dim(self, axis: str) -> int | None:
        """The dim that is cut over a mesh axis, or None."""
        return next((dim for name, dim in self.cuts if name == axis), None)

    def axes(self, dim: int) -> tuple[str, ...]:
        """The mesh axes that cut a dim, the outermost one first."""
        found = [axis for axis, cut in self.cuts if cut == dim]
        return tuple(sorted(found, key=lambda axis: _MANUAL.index(axis) if axis in _MANUAL else len(_MANUAL)))

    @property
    def spec(self) -> PartitionSpec:
        """The same for JAX, written as a compiled step writes it: nothing behind the last cut dim."""
        return self._spec({axis for axis, _ in self.cuts})

    @property
    def manual_spec(self) -> PartitionSpec:
        """The spec inside of the `shard_map`, which names no axes that are left to the compiler."""
        return self._spec(_MANUAL)

    def _spec(self, named: Collection[str]) -> PartitionSpec:
        dims = [dim for axis, dim in self.cuts if axis in named]
        by_dim = [tuple(axis for axis in self.axes(dim) if axis in named) for dim in range(1 + max(dims, default=-1))]
        return PartitionSpec(*((axes or (None,))[0] if len(axes) < 2 else axes for axes in by_dim))

    def stored(self, shape: Shape) -> Shape:
        """The shape in which an array of some shape is stored."""
        longer = dict(self.padded)
        return tuple(longer.get(dim, size) for dim, size in enumerate(shape))

    def behind(self, lead: int, *cuts: tuple[str, int]) -> "Placement":
        """The placement of arrays with `lead` more dims in front, some of them cut."""
        moved = tuple((axis, dim + lead) for axis, dim in self.cuts)
        return Placement((*cuts, *moved), tuple((dim + lead, size) for dim, size in self.padded))

    def cut_even(self, shape: Shape, axis: str, sizes: Mapping[str, int]) -> "Placement":
        """Cuts an array over one more axis, along the largest dim that the devices divide, if there is one.

        Args:
          sizes: of the axes of the mesh.
        """
        count, parts = sizes.get(axis, 1), self._parts(shape, sizes)
        dims = [dim for dim, size in enumerate(shape) if size and size % (count * parts[dim]) == 0]
        if not dims or count == 1:
            return self
        return Placement((*self.cuts, (axis, max(dims, key=lambda dim: (parts[dim] == 1, shape[dim])))), self.padded)

    def cut_any(self, shape: Shape, axis: str, sizes: Mapping[str, int]) -> "Placement":
        """Cuts an array over one more axis so that the parts are as small as can be, padded where nothing divides.

        Of dims that are equally good it takes one that is not cut yet, and then the largest one. Arrays without a dim that
        is worth it, such as scalars, are left as they are.
        """
        count, parts = sizes.get(axis, 1), self._parts(shape, sizes)

        def left(dim: int) -> Fraction:  # how much of what a device holds it would still hold
            here = -(-shape[dim] // parts[dim])
            return Fraction(-(-here // count), here)

        dims = [dim for dim, size in enumerate(shape) if size and left(dim) < 1]
        if not dims or count == 1:
            return self
        # Parts along a dim that a further axis cuts, too, cannot be gathered without making it whole along that axis.
        further = {dim for axis, dim in self.cuts if axis not in _MANUAL}
        dim = min(dims, key=lambda dim: (left(dim), dim in further, parts[dim] > 1, -shape[dim]))
        whole = count * parts[dim]
        longer = {**dict(self.padded), dim: -(-shape[dim] // whole) * whole}
        padded = tuple((dim, size) for dim, size in sorted(longer.items()) if size != shape[dim])
        return Placement((*self.cuts, (axis, dim)), padded)

    def _parts(self, shape: Shape, sizes: Mapping[str, int]) -> list[int]:
        """For each dim, into how many parts it is cut."""
        parts = [1] * len(shape)
        for axis, dim in self.cuts:
            parts[dim] *= sizes.get(axis, 1)
        return parts


def fit(array: Any, shape: Sequence[int]) -> Any:
    """An array with each dim cut off at the end, or filled with zeros there, so that it has a shape; itself if it has it.

    Args:
      array: of JAX (or traced), of NumPy, or a ShapeDtypeStruct; the result is of the same kind.
    """
    shape = tuple(shape)
    if array.shape == shape:
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, array.dtype)
    array = array[tuple(slice(0, size) for size in shape)]
    widths = [(0, size - has) for has, size in zip(array.shape, shape, strict=True)]
    if not any(width for _, width in widths):
        return array
    library: Any = np if isinstance(array, np.ndarray) else jnp
    return library.pad(array, widths)
