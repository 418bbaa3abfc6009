"""Evaluates users' functions on shapes, with the mesh axes bound that the functions may name."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxpipe.mesh import DATA, PIPE, manual_axes, pipe_size
from jaxpipe.model.blame import Fault
from jaxpipe.model.capture import Captured, capture
from jaxpipe.model.jaxprs import equations
from jaxpipe.types import Avals, Tree


def with_axes(mesh: Mesh, function: Callable[[], tuple[()]]) -> Callable[[], tuple[()]]:
    """`function` as one that runs with the mesh axes bound, as they are inside a compiled step.

    Users' layers and losses may name those axes, `jax.lax.pmean(x, "data")`, so whatever traces them has to run like this.
    Nothing leaves the `shard_map`: the function returns () and puts its results where the caller finds them.
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


def refuse_deadlocks(traced: ClosedJaxpr, mesh: Mesh) -> None:
    """Refuses users' functions in which the ranks of `mesh` would wait for each other for ever.

    The ranks of a pipeline run different layers at the same time, so only devices of one rank can meet in a layer.

    Args:
      traced: the function, as `jax.make_jaxpr` returns it.

    Raises:
      Fault: the function has a collective in which other ranks would have to take part.
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


def on_one_device(axes: Iterable[str]) -> contextlib.AbstractContextManager[object]:
    """While functions are traced inside, the mesh around has these axes, of one device each.

    A layer that constrains a value with a bare PartitionSpec, or maps a function over an axis, needs a mesh that has the
    axis, wherever it runs. If there is a mesh around already, it stays.
    """
    names = tuple(sorted(axes))
    if not names or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    mesh = AbstractMesh((1,) * len(names), names, axis_types=(AxisType.Auto,) * len(names))
    return jax.sharding.use_abstract_mesh(mesh)


def with_data_axis(function: Callable[..., Tree], size: int) -> Callable[..., Tree]:
    """Lets a function that runs on one data rank be traced without a mesh.

    Inside the function, "data" is an axis of the given size. That axis is the first dim of the results.
    """
    return jax.vmap(function, in_axes=None, axis_name=DATA, axis_size=size)


def on_one_data_rank(function: Callable[..., Tree], *args: Avals) -> Avals:
    """`jax.eval_shape(function, *args)` without a mesh, with "data" as an axis of one device."""
    found = jax.eval_shape(with_data_axis(function, 1), *args)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), found)


def axes_of(equation: JaxprEqn) -> set[Hashable]:
    """The mesh axes that a collective names; empty for other equations."""
    named = [equation.params.get(name, ()) for name in ("axes", "axis_name")]
    return {axis for axes in named for axis in (axes if isinstance(axes, (tuple, list)) else (axes,))}
