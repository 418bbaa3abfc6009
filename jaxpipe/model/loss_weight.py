"""Finds out on which inputs the weight of a loss depends, and computes it from those inputs alone.

A value depends on an input if other numbers in that input could change the value. What is known while tracing, such as
shapes, is no dependence, because it does not appear in the jaxpr. If a primitive has a body (a jitted function, a loop),
the body is examined, so a loop that sums totals from outputs and weights from labels keeps the two apart. For a primitive
that is not known here, every result is assumed to depend on every operand.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxpipe.types import Avals, Tree

# Primitives that call one body with their own inputs, and return what it returns.
_CALLS = {
    "call",
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
    "shard_map",
}


def depends(traced: ClosedJaxpr, inputs: Iterable[int]) -> list[bool]:
    """For each result of a jaxpr, whether it depends on any of the given inputs.

    Args:
      traced: as `jax.make_jaxpr` returns it.
      inputs: the numbers of these inputs in the flat list of all inputs.
    """
    chosen = set(inputs)
    jaxpr = _open(traced)
    return _results(jaxpr, [number in chosen for number in range(len(jaxpr.invars))])


def without(function: Callable[[Tree, Tree], jax.Array], unused: Avals, used: Tree) -> jax.Array:
    """Computes `function(unused, used)`, a scalar that does not depend on `unused`.

    Only the operations that lead to the result are run, so that nothing is printed or called back for invented numbers.
    Some of them may still read `unused`, such as a loop that also computes other values. They read zeros, and XLA removes
    what depends on them.

    Args:
      unused: shapes only.
      used: arrays.
    """
    traced = jax.make_jaxpr(function)(unused, used)
    jaxpr = _open(traced)
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        kept.append(equation)
        needed.update(atom for atom in equation.invars if not isinstance(atom, Literal))
    zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(unused)]
    arguments = [*zeros, *jax.tree.leaves(used)]
    return eval_jaxpr(jaxpr.replace(eqns=kept[::-1]), traced.consts, *arguments)[0]


def _open(jaxpr: Any) -> Jaxpr:
    """The jaxpr inside a closed one. In newer versions of JAX the two are one class."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _results(jaxpr: Jaxpr, flags: Sequence[bool]) -> list[bool]:
    """For each result of a jaxpr, whether it depends on the flagged inputs."""
    flagged: set[Var | Literal] = {var for var, flag in zip(jaxpr.invars, flags, strict=True) if flag}

    def read(atom: Var | Literal) -> bool:
        return not isinstance(atom, Literal) and atom in flagged

    for equation in jaxpr.eqns:
        here = [read(atom) for atom in equation.invars]
        if not any(here):
            continue
        mutable = [atom for atom in equation.invars if "Ref" in type(atom.aval).__name__]
        results = [True] * len(equation.outvars) if mutable else _through(equation, here)
        flagged.update(var for var, flag in zip(equation.outvars, results, strict=True) if flag)
        flagged.update(atom for atom in mutable)  # the equation may have written to it
    return [read(atom) for atom in jaxpr.outvars]


def _through(equation: JaxprEqn, flags: list[bool]) -> list[bool]:
    """For each result of an equation, whether it depends on the flagged inputs, of which there is at least one."""
    name, params = equation.primitive.name, equation.params
    everything = [True] * len(equation.outvars)
    if name == "cond":
        if flags[0]:
            return everything
        found = [_results(_open(branch), flags[1:]) for branch in params["branches"]]
        return [any(each) for each in zip(*found, strict=True)]
    if name == "while":
        return _while(params, flags)
    bodies = [_open(value) for value in params.values() if hasattr(_open(value), "eqns")]
    if len(bodies) != 1 or len(bodies[0].invars) != len(flags) or len(bodies[0].outvars) != len(everything):
        return everything
    if name == "scan":
        return _scan(equation, bodies[0], flags)
    return _results(bodies[0], flags) if name in _CALLS else everything


def _while(params: dict[str, Any], flags: list[bool]) -> list[bool]:
    """The same for a `while`, whose inputs are constants of the condition, constants of the body, and the carry."""
    condition, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    of_condition, of_body, carry = flags[:first], flags[first:second], flags[second:]
    while True:
        if any(_results(condition, of_condition + carry)):
            return [True] * len(carry)  # the number of iterations changes every result
        after = [old or new for old, new in zip(carry, _results(body, of_body + carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _scan(equation: JaxprEqn, body: Jaxpr, flags: list[bool]) -> list[bool]:
    """The same for a `scan`, whose inputs are constants, carry and slices, and whose results are carry and slices.

    A slice is recognised by its shape, which has one dim less inside of the loop than outside.
    """

    def sliced(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(len(a.aval.shape) != len(b.aval.shape) for a, b in zip(outer, inner, strict=True))

    num_carry = len(body.outvars) - sliced(equation.outvars, body.outvars)
    num_constants = len(body.invars) - sliced(equation.invars, body.invars) - num_carry
    flags = list(flags)
    while True:
        results = _results(body, flags)
        carry = flags[num_constants : num_constants + num_carry]
        after = [old or new for old, new in zip(carry, results[:num_carry], strict=True)]
        if after == carry:
            return [*carry, *results[num_carry:]]
        flags[num_constants : num_constants + num_carry] = after
