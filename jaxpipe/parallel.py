"""For layers that have a say in how they are computed over further axes of the mesh, such as "model" or "sequence".

A pipeline leaves such axes to the compiler: it reads off the params how they are cut, and derives the rest. `constrain`
tells it how a value inside of a layer is to be cut. `shard_map` takes the axes out of its hands: inside, a function sees
its own part of each array, and may use collectives or a Pallas kernel.

Both do nothing, and cost nothing, where the layer runs without such an axis: on a mesh that has none, in
`jaxpipe.reference`, or alone. So one layer serves all meshes.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxpipe.checks import did_you_mean, show
from jaxpipe.errors import ShardingError
from jaxpipe.mesh import DATA, PIPE, further_axes

__all__ = ["constrain", "shard_map"]

Result = TypeVar("Result")


def constrain(x: Result, spec: Any) -> Result:
    """`jax.lax.with_sharding_constraint` for a value inside of a layer.

    Args:
      x: an array, or a tree of arrays.
      spec: a PartitionSpec such as `P(None, None, "model")` for the dims of `x`, or a tree of them that is a prefix of `x`.
        A layer has the rows of one data rank, so "data" may be named, and means nothing. So do axes that a mesh without
        further axes does not have.

    Returns:
      The same values.

    Raises:
      ShardingError: the mesh has further axes, and not the one that is named.
    """
    left = _left_to_the_compiler()
    if not left:
        return x
    specs = jax.tree.map(lambda each: _only(each, left, "constrain"), spec, is_leaf=_is_spec)
    return jax.lax.with_sharding_constraint(x, specs)


def shard_map(
    function: Callable[..., Any],
    *,
    in_specs: Any,
    out_specs: Any,
    axis_names: str | Iterable[str],
    check_vma: bool = True,
) -> Callable[..., Any]:
    """`jax.shard_map` over further axes, inside of a layer.

    Inside of the function `jax.lax.psum`, `all_gather`, `psum_scatter`, `all_to_all` and `axis_index` may name these axes,
    and arrays are the parts that the specs say. Derivatives are those of the function as a whole, for params too. An axis
    that is not there is an axis of one device: the function gets whole arrays, and its collectives leave them as they are.

    `ppermute` is not possible in a pipeline, whatever the axis: all devices of the mesh take part in one, and they run
    different layers at one time.

    Args:
      function: takes arrays or trees of arrays, by position.
      in_specs: as for `jax.shard_map`: they name axes of `axis_names` only. Close over nothing that is cut.
      out_specs: the same for results.
      axis_names: one or several further axes of the mesh.
      check_vma: as for `jax.shard_map`: has JAX check that a result which `out_specs` does not cut is the same on all
        devices, and spares collectives in the backward pass. Pass False for functions that do not say what varies, such
        as most Pallas kernels.

    Raises:
      ShardingError: an axis is "pipe" or "data", or the mesh has further axes and not this one.
    """
    names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    for axis in names:
        if axis in (PIPE, DATA):
            raise ShardingError(
                f'shard_map(axis_names={show(axis_names)}): a layer is inside of "{axis}" already: it has the layers of '
                'one rank, and the rows of one data rank. Collectives over "data" may be used in it as it is.'
            )

    def run(*args: Any) -> Any:
        left = _left_to_the_compiler()
        specs = jax.tree.map(lambda each: _only(each, left, "shard_map"), (in_specs, out_specs), is_leaf=_is_spec)
        here = frozenset(_known(axis, left, "shard_map") for axis in names) & left.keys()
        inner = _on_one_device(function, [axis for axis in names if axis not in here])
        if not here:
            return inner(*args)
        mapped = jax.shard_map(inner, in_specs=specs[0], out_specs=specs[1], axis_names=here, check_vma=check_vma)
        return mapped(*args)

    return run


def _on_one_device(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """The function with axes of one device."""
    for axis in names:

        def with_axis(*args: Any, inner: Callable[..., Any] = function, axis: str = axis) -> Any:
            # With a dim of 1 in every argument: collectives of values that do not have it are not right in every version.
            wide = jax.tree.map(lambda a: jnp.asarray(a)[None], args)
            found = jax.vmap(inner, axis_name=axis, axis_size=1)(*wide)
            return jax.tree.map(lambda a: a[0], found)

        function = with_axis
    return function


def _left_to_the_compiler() -> dict[str, int]:
    """The further axes of the mesh around, with their sizes; none where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis: size for axis, size in further_axes(mesh).items() if kinds[axis] == AxisType.Auto}


def _only(spec: Any, left: dict[str, int], caller: str) -> Any:
    """The spec with the axes that are left to the compiler and no others."""
    if not isinstance(spec, PartitionSpec):
        return spec

    def one(entry: Any) -> Any:
        if entry is None or entry is PartitionSpec.UNCONSTRAINED:
            return entry
        names = (entry,) if isinstance(entry, str) else tuple(entry)
        kept = tuple(name for name in names if _known(name, left, caller) in left)
        return kept[0] if len(kept) == 1 else kept or None

    return PartitionSpec(*map(one, spec))


def _known(axis: str, left: dict[str, int], caller: str) -> str:
    if left and axis not in left and axis not in (PIPE, DATA):
        mesh = jax.sharding.get_abstract_mesh()
        if axis not in mesh.axis_names:
            raise ShardingError(
                f"jaxpipe.parallel.{caller} names the axis {axis!r}, and the mesh has the axes "
                f"{', '.join(mesh.axis_names)}.{did_you_mean(axis, mesh.axis_names)} An axis of size 1 is there and cuts "
                f"nothing: make_mesh(..., {axis}=1)."
            )
    return axis


def _is_spec(value: Any) -> bool:
    return value is None or isinstance(value, PartitionSpec)
