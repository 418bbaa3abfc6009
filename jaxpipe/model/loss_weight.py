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

from jaxpipe.model.jaxprs import CALLS, bodies, opened, scan_counts
from jaxpipe.types import Avals, Tree

# A user's function may also be mapped over the mesh, which changes nothing about what depends on what.
_CALLS = CALLS | {"call", "shard_map"}


def depends(traced: ClosedJaxpr, inputs: Iterable[int]) -> list[bool]:
    """For each result of a jaxpr, whether it depends on any of the given inputs.

    Args:
      traced: as `jax.make_jaxpr` returns it.
      inputs: the numbers of these inputs in the flat list of all inputs.
    """
    chosen = set(inputs)
    jaxpr = opened(traced)
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
    jaxpr = opened(traced)
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
        found = [_results(opened(branch), flags[1:]) for branch in params["branches"]]
        return [any(each) for each in zip(*found, strict=True)]
    if name == "while":
        return _while(params, flags)
    inside = bodies(equation)
    if len(inside) != 1 or len(inside[0].invars) != len(flags) or len(inside[0].outvars) != len(everything):
        return everything
    if name == "scan":
        return _scan(equation, inside[0], flags)
    return _results(inside[0], flags) if name in _CALLS else everything


def _while(params: dict[str, Any], flags: list[bool]) -> list[bool]:
    """The same for a `while`, whose inputs are constants of the condition, constants of the body, and the carry."""
    condition, body = opened(params["cond_jaxpr"]), opened(params["body_jaxpr"])
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
    """The same for a `scan`, whose inputs are constants, carry and slices, and whose results are carry and slices."""
    num_constants, num_carry = scan_counts(equation)
    flags = list(flags)
    while True:
        results = _results(body, flags)
        carry = flags[num_constants : num_constants + num_carry]
        after = [old or new for old, new in zip(carry, results[:num_carry], strict=True)]
        if after == carry:
            return [*carry, *results[num_carry:]]
        flags[num_constants : num_constants + num_carry] = after
