"""Keeps XLA from moving parts of an array between neighbours along a further axis, inside of an op.

A slice along a dim that the compiler has cut, such as `q, k, v = jnp.split(x @ qkv, 3, -1)`, needs elements of the next
device, and XLA brings them by a collective permute. All devices of a mesh take part in one, on CPUs at least, and the ranks
of a pipeline run different ops: they would wait for each other for ever. An all-gather, an all-reduce or an all-to-all has
groups, and all devices of a group run the same op. So where an equation takes a dim apart or puts it together, that dim is
made whole: an all-gather where it was cut, nothing where it was not. The other dims are left to the compiler as before.

Not prevented is the permute that brings a dim from one further axis to another one: `permutes.py` refuses it.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxpipe.mesh import further_axes
from jaxpipe.model.jaxprs import CALLS, bodies, opened
from jaxpipe.types import Leaves, Shape, Tree

# Equations with bodies that are run here as they are, with other bodies. Other calls are put inline; what is left, such as
# `shard_map`, cuts nothing that it does not say.
_AROUND = frozenset({"checkpoint", "cond", "remat", "remat2", "scan", "while"})


def with_whole_dims(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """The same function of arrays, in which such dims are made whole if the mesh around has further axes."""

    def run(*args: Tree) -> Tree:
        if math.prod(_left().values()) == 1:
            return function(*args)
        traced, outputs = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(outputs), _run(traced, jax.tree.leaves(args)))

    return run


def _left() -> dict[str, int]:
    """The axes of several devices that are left to the compiler here."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis: n for axis, n in further_axes(mesh).items() if n > 1 and kinds[axis] == AxisType.Auto}


def _run(traced: jex.ClosedJaxpr, args: Leaves) -> Leaves:
    jaxpr = opened(traced)
    known: dict[Any, Any] = {
        **dict(zip(jaxpr.constvars, traced.consts, strict=True)),
        **dict(zip(jaxpr.invars, args, strict=True)),
    }

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else known[atom]

    for equation in jaxpr.eqns:
        scope = str(equation.source_info.name_stack)
        with jax.named_scope(scope) if scope else contextlib.nullcontext():
            found = _equation(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: jex.JaxprEqn, args: Leaves) -> Leaves:
    primitive, params = equation.primitive, equation.params
    inside = bodies(equation)
    if inside and primitive.name in _AROUND:
        params = {name: _converted(value) for name, value in params.items()}
    elif primitive.name in CALLS and len(inside) == 1 and len(inside[0].invars) == len(args):
        body: Any = params.get("jaxpr", params.get("call_jaxpr"))
        return _run(body if hasattr(body, "consts") else jex.ClosedJaxpr(body, ()), args)
    dims = _dims(equation)
    args = [_whole(arg, own) for arg, own in zip(args, dims[: len(args)], strict=True)] if dims else args
    made: Any = primitive.bind(*args, **primitive.get_bind_params(params))
    made = list(made) if primitive.multiple_results else [made]
    return [_whole(leaf, own) for leaf, own in zip(made, dims[len(args) :], strict=True)] if dims else made


def _converted(value: Any) -> Any:
    """A parameter of an equation, with such equations in the bodies that it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_converted, value)) if any(hasattr(opened(v), "eqns") for v in value) else value
    if not hasattr(opened(value), "eqns"):
        return value
    closed = value if hasattr(value, "consts") else jex.ClosedJaxpr(value, ())
    inputs: list[Any] = [v.aval for v in opened(value).invars]
    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
    made = jax.make_jaxpr(lambda *args: _run(closed, list(args)))(*avals)
    return made if hasattr(value, "consts") else opened(made)


def _dims(equation: jex.JaxprEqn) -> list[set[int]]:
    """Per operand, then per result, the dims that have to be whole; nothing for most equations."""
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(atom.aval, "shape", ()) for atom in (*equation.invars, *equation.outvars)]
    ranks = [len(shape) for shape in shapes]
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        specs = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        grouped = params["feature_group_count"] > 1 or params["batch_group_count"] > 1
        return [set(spec if grouped else spec[2:]) for spec in specs]
    if name == "reshape":
        return list(_regrouped(shapes[0], shapes[-1], _left().values()))
    if name == "fft":
        return [set(range(rank)[-len(params["fft_lengths"]) :]) for rank in ranks]
    dims = set(_taken_apart(name, params, ranks[-1]))
    if name == "slice":
        sizes = shapes[0]
        cut = zip(
            params["start_indices"], params["limit_indices"], params["strides"] or (1,) * len(sizes), sizes, strict=True
        )
        dims = {dim for dim, (start, stop, step, size) in enumerate(cut) if (start, stop, step) != (0, size, 1)}
    return [dims if rank == ranks[-1] else set[int]() for rank in ranks] if dims else []


def _taken_apart(name: str, params: dict[str, Any], rank: int) -> Iterable[int]:
    """The dims that an equation takes apart or puts together, of operands and results of one rank."""
    if name in ("split", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
        return [params["axis"]]
    if name in ("concatenate", "sort"):
        return [params["dimension"]]
    if name == "rev":
        return params["dimensions"]
    if name == "pad":
        return [dim for dim, config in enumerate(params["padding_config"]) if tuple(config) != (0, 0, 0)]
    if "window_dimensions" in params:  # reduce_window and its kin
        keys = ("window_dimensions", "window_strides", "padding")
        windows = zip(*[params[key] for key in keys], strict=True)
        return [dim for dim, (size, step, pad) in enumerate(windows) if (size, step, *pad) != (1, 1, 0, 0)]
    return []


def _regrouped(before: Shape, after: Shape, sizes: Collection[int]) -> tuple[set[int], set[int]]:
    """The dims of a reshape that are split or merged, if the first one of the smaller ones is not cut evenly by an axis.

    The compiler would cut it by a part of the axis, and the next one by the rest.
    """
    found: tuple[set[int], set[int]] = set(), set()
    sides = before, after
    if 0 in before:
        return found
    start = [0, 0]
    while start[0] < len(before) and start[1] < len(after):
        end = [at + 1 for at in start]
        while len(set(products := [math.prod(sides[i][start[i] : end[i]]) for i in (0, 1)])) > 1:
            end[products.index(min(products))] += 1
        groups = [range(start[i], end[i]) for i in (0, 1)]
        if len(groups[0]) + len(groups[1]) > 2:
            firsts = [next((n for n in (sides[i][dim] for dim in groups[i]) if n > 1), 0) for i in (0, 1)]
            if any(first % size for first in firsts for size in sizes):
                found[0].update(groups[0])
                found[1].update(groups[1])
        start = end
    return found


def _whole(x: Any, dims: set[int]) -> Any:
    """The array with these dims on every device, and the others as the compiler likes."""
    if not dims or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None if d in dims else free for d in range(x.ndim))))
