"""Shapes of what users' functions return, with the axes that they may name."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpipe.mesh import DATA, PIPE, manual_axes, pipe_size
from jaxpipe.model.blame import Fault
from jaxpipe.model.capture import Captured, capture
from jaxpipe.types import Avals, Tree


def with_axes(mesh: Mesh, function: Callable[[], tuple[()]]) -> Callable[[], tuple[()]]:
    """`function` as one that runs with the mesh axes bound, as they are inside a compiled step.

    Users' layers and losses may name those axes, `jax.lax.pmean(x, "data")`, so whatever traces them has to run like this.
    """
    inside = jax.shard_map(
        function, mesh=mesh, in_specs=(), out_specs=(), axis_names=manual_axes(mesh), check_vma=False
    )
    return functools.partial(jax.eval_shape, inside)


def abstract(function: Callable[..., Tree], *args: Avals, mesh: Mesh) -> Avals:
    """`jax.eval_shape(function, *args)`, with the mesh axes bound.

    Raises:
      Fault: the function would wait for ever in a step.
    """
    found: list[Captured] = []

    def trace() -> tuple[()]:
        found.append(capture(function, *args))
        return ()

    with_axes(mesh, trace)()
    refuse_deadlocks(found[0].jaxpr, mesh)
    return found[0].outputs


def refuse_deadlocks(traced: Any, mesh: Mesh) -> None:
    """Raises Fault if a user's function, as it was traced, has a collective in which ranks of `mesh` would wait for ever.

    The ranks of a pipeline run different layers at one time, so only devices of one rank can meet in a layer.
    """
    for equation in equations(traced):
        if equation.primitive.name == "ppermute" and pipe_size(mesh) > 1:
            raise Fault(
                "uses jax.lax.ppermute (or pshuffle). Every device of the mesh takes part in a permute, while the ranks "
                "of a pipeline run different layers at one time: they would wait for each other for ever. Use "
                "jax.lax.all_gather or all_to_all over the data axis instead."
            )
        if PIPE in axes_of(equation):
            raise Fault(
                f'names the mesh axis "{PIPE}" (in {equation.primitive.name}). The ranks of a pipeline run different '
                "layers at one time: they would wait for each other for ever, and the result would depend on the number "
                'of stages. Layers and loss_fn may use the axis "data".'
            )


def with_data_axis(function: Callable[..., Tree], size: int) -> Callable[..., Tree]:
    """The function of one data rank as one that is traced without a mesh: "data" is an axis of `size`, dim 0 of results."""
    return jax.vmap(function, in_axes=None, axis_name=DATA, axis_size=size)


def on_one_data_rank(function: Callable[..., Tree], *args: Avals) -> Avals:
    """`jax.eval_shape(function, *args)` without a mesh, with "data" as an axis of one device."""
    found = jax.eval_shape(with_data_axis(function, 1), *args)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), found)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those in the bodies of its equations included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for body in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(body, "jaxpr", body), "eqns"):
                    yield from equations(body)


def axes_of(equation: Any) -> set[Any]:
    """The mesh axes that a collective names."""
    named = [equation.params.get(name, ()) for name in ("axes", "axis_name")]
    return {axis for axes in named for axis in (axes if isinstance(axes, (tuple, list)) else (axes,))}
