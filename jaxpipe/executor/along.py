"""Gathers and scatters along one axis of the mesh, of arrays that may be cut over further axes.

The compiler would first make such an array whole along the further axes, on each device, and cut it again behind the
collective: by the size of the axis more to hold, and more to move. So a collective runs with these axes in our hands, too,
and each device gathers its own part.
"""

from collections.abc import Callable

import jax

from jaxpipe.layout.on_mesh import left_to_the_compiler
from jaxpipe.layout.placement import Placement
from jaxpipe.mesh import further_axes


def gathered(array: jax.Array, axis: str, placement: Placement) -> jax.Array:
    """The array that is cut along `axis` as `placement` says, whole along it; inside `shard_map`."""
    dim = placement.dim(axis)
    assert dim is not None
    return _by_part(lambda a: jax.lax.all_gather(a, axis, axis=dim, tiled=True), array, axis, placement)


def scattered(array: jax.Array, axis: str, placement: Placement) -> jax.Array:
    """The sum of the arrays along `axis`, of which each device keeps its part: the transpose of `gathered`."""
    dim = placement.dim(axis)
    assert dim is not None
    return _by_part(lambda a: jax.lax.psum_scatter(a, axis, scatter_dimension=dim, tiled=True), array, axis, placement)


def _by_part(
    collective: Callable[[jax.Array], jax.Array], array: jax.Array, axis: str, placement: Placement
) -> jax.Array:
    own = left_to_the_compiler(placement)
    axes = frozenset(further_axes(jax.sharding.get_abstract_mesh()))
    # The parts of a dim that both cut do not lie side by side on a device. That is left to the compiler.
    if not own.cuts or own.axes(placement.dim(axis) or 0):
        return collective(array)
    return jax.shard_map(collective, in_specs=own.spec, out_specs=own.spec, axis_names=axes, check_vma=False)(array)
