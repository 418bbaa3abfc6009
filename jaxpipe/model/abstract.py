"""Shapes of what users' functions return, with the axes that they may name."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.mesh import DATA, manual_axes, pipe_size
from jaxpipe.model.blame import Fault
from jaxpipe.model.shapes import avals

Tree = Any


def abstract(function: Callable[..., Tree], *args: Tree, mesh: Mesh | None = None) -> Tree:
    """`jax.eval_shape(function, *args)` with the mesh axes bound as they are inside a compiled step.

    Users' layers and losses may name them: `jax.lax.pmean(x, "data")`.

    Args:
      mesh: of the step; None binds "data" as an axis of one device.

    Raises:
      Fault: the function would wait for ever in a step.
    """
    args = avals(args)
    if mesh is None:
        found = jax.eval_shape(with_data_axis(function, 1), *args)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), found)
    spec = jax.sharding.PartitionSpec()
    inside = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual_axes(mesh), check_vma=False
    )
    traced, found = jax.make_jaxpr(inside, return_shape=True)(*args)
    refuse_permutes(traced, mesh)
    return avals(found)


def refuse_permutes(traced: Any, mesh: Mesh) -> None:
    """Raises Fault if a user's function, as it was traced, has a permute that ranks of `mesh` would wait in."""
    if pipe_size(mesh) > 1 and any(permutes(traced)):
        raise Fault(
            "uses jax.lax.ppermute (or pshuffle). Every device of the mesh takes part in a permute, while the ranks "
            "of a pipeline run different layers at one time: they would wait for each other for ever. Use "
            "jax.lax.all_gather or all_to_all over the data axis instead."
        )


def with_data_axis(function: Callable[..., Tree], size: int) -> Callable[..., Tree]:
    """The function of one data rank as one that is traced without a mesh: "data" is an axis of `size`, dim 0 of results."""
    return jax.vmap(function, in_axes=None, axis_name=DATA, axis_size=size)


def permutes(jaxpr: Any) -> Iterator[Any]:
    """The permutes in a jaxpr and in the bodies of its equations."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "ppermute":
            yield equation
        for value in equation.params.values():
            for body in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(body, "jaxpr", body), "eqns"):
                    yield from permutes(body)
