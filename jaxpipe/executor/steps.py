"""A trace as steps that can be dealt to two ops: calls are inlined, and each step says what it costs to run it twice."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from jaxpipe.model.jaxprs import CALLS, bodies
from jaxpipe.model.values import raw_aval
from jaxpipe.types import Leaves

# These only lay out anew what is there, or are about single numbers and keys.
_VIEWS = frozenset(
    "bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice "
    "dynamic_update_slice expand_dims iota pad random_fold_in random_split random_unwrap random_wrap reshape rev slice "
    "squeeze stop_gradient transpose".split()
)
# One operation, or a few, for each entry of a result or of an operand.
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh ceil clamp cos cosh cbrt div eq erf erf_inv erfc exp exp2 "
    "expm1 floor ge gt imag integer_pow is_finite le log log1p logistic lt max min mul mul_add ne neg nextafter not or pow "
    "real reduce_and reduce_max reduce_min reduce_or reduce_precision reduce_prod reduce_sum rem round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor".split()
)


@dataclass(frozen=True, eq=False)
class Value:
    """A value that is in no trace: `aval` is its shape and dtype. Variables of traces serve as values, too."""

    aval: Any


@dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    Attributes:
      inputs, outputs: values; literals are not among the inputs.
      run: from the inputs to the outputs.
      again: how many operations it takes to run it twice, or None if that is never worth it: products, loops, noise.
      effect: whether it does something beside.
      equation: that of a scan that may be cut, or None.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    run: Callable[[Leaves], Leaves]
    again: int | None = None
    effect: bool = False
    equation: JaxprEqn | None = None


@dataclass(frozen=True)
class Trace:
    """A function as steps.

    Attributes:
      inputs: its arguments, flat.
      outputs: its results, flat; literals may be among them.
      constants: values that are known.
    """

    inputs: list[Any]
    outputs: list[Any]
    constants: Mapping[Any, Any]
    steps: list[Step]


def trace_of(jaxpr: ClosedJaxpr) -> Trace:
    """The steps of a closed jaxpr. Where mesh axes are named, they have to be bound."""
    inputs: list[Any] = [v.aval for v in jaxpr.jaxpr.invars]
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
    flat = jax.make_jaxpr(lambda *values: _inlined(jaxpr, values))(*arguments)
    inner = flat.jaxpr
    steps = [_step(inner, equation) for equation in inner.eqns]
    return Trace(list(inner.invars), list(inner.outvars), dict(zip(inner.constvars, flat.consts, strict=True)), steps)


def run(steps: Iterable[Step], known: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """Runs steps from known values; gives the function that looks values up, literals too."""
    found = dict(known)
    for step in steps:
        made = step.run([found[value] for value in step.inputs])
        found.update(zip(step.outputs, made, strict=True))

    def read(value: Any) -> Any:
        if isinstance(value, Literal):
            aval: Any = value.aval
            return jnp.asarray(value.val, aval.dtype)
        return found[value]

    return read


def size(value: Any) -> int:
    """The bytes of a value."""
    aval = raw_aval(jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype))
    return math.prod(aval.shape) * aval.dtype.itemsize


def variables(values: Iterable[Any]) -> list[Any]:
    """The values that are not literals, each once."""
    return list(dict.fromkeys(value for value in values if not isinstance(value, Literal)))


def _inlined(jaxpr: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    inner = jaxpr.jaxpr
    found = dict(zip([*inner.constvars, *inner.invars], [*jaxpr.consts, *arguments], strict=True))
    for equation in inner.eqns:
        values = [v.val if isinstance(v, Literal) else found[v] for v in equation.invars]
        made = _called(equation, values)
        if made is None:
            known = {v: value for v, value in zip(equation.invars, values, strict=True) if not isinstance(v, Literal)}
            made = eval_jaxpr(_alone(inner, equation, list(known)), [], *known.values())
        found.update(zip(equation.outvars, made, strict=True))
    return [v.val if isinstance(v, Literal) else found[v] for v in inner.outvars]


def _called(equation: JaxprEqn, values: Sequence[Any]) -> Sequence[Any] | None:
    """The results of a call, inlined; None if the equation is something else."""
    name, params, inside = equation.primitive.name, equation.params, bodies(equation)
    if name == "optimization_barrier":
        return [jax.lax.optimization_barrier(value) for value in values]  # one for each, so that they may be dealt out
    if name not in CALLS or len(inside) != 1 or len(inside[0].invars) != len(values):
        return None
    closed = next((each for each in params.values() if isinstance(each, ClosedJaxpr)), ClosedJaxpr(inside[0], []))
    if params.get("differentiated") and params.get("prevent_cse"):
        # As JAX does where it compiles a `jax.checkpoint`: what is computed again is not merged with the first time.
        values = [jax.lax.optimization_barrier(value) for value in values]
    return _inlined(closed, values)


def _step(jaxpr: Any, equation: JaxprEqn) -> Step:
    inputs = variables(equation.invars)
    name, alone = equation.primitive.name, _alone(jaxpr, equation, inputs)
    effect = any(type(each).__name__ != "NamedAxisEffect" for each in equation.effects)
    if name == "optimization_barrier":
        # What the second op makes again of what was brought to it could be merged with nothing.
        return Step(tuple(inputs), tuple(equation.outvars), lambda values: eval_jaxpr(alone, [], *values), 0)
    again = 0 if name in _VIEWS else None
    if name in _ELEMENTWISE:
        avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
        again = max(math.prod(a.shape) for a in avals)
    is_scan = name == "scan" and not effect
    return Step(
        tuple(inputs),
        tuple(equation.outvars),
        lambda values: eval_jaxpr(alone, [], *values),
        None if effect else again,
        effect,
        equation if is_scan else None,
    )


def _alone(jaxpr: Any, equation: JaxprEqn, inputs: Sequence[Any]) -> Any:
    """The jaxpr of one equation."""
    names = jaxpr.debug_info
    names = names.with_unknown_names() if hasattr(names, "with_unknown_names") else names
    return jaxpr.replace(
        constvars=[], invars=list(inputs), outvars=list(equation.outvars), eqns=[equation], debug_info=names
    )
