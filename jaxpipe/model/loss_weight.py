"""What a weight depends on, read off the traced function, and the function without what the weight does not need.

A value depends on an input if changing the numbers in that input could change it. What is known while tracing, such as
shapes, is no dependence: it never appears in a jaxpr. Where a primitive has a body (a jitted function, a loop), the
question is asked of the body, so that a loop that adds up totals from outputs and weights from labels keeps the two
apart. Of a primitive that is not known here everything is taken to depend on everything.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Literal

from jaxpipe.types import Tree

# Primitives that call one body with their own inputs and return what it returns.
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


def depends(traced: Any, inputs: Iterable[int]) -> list[bool]:
    """Whether each result of a jaxpr depends on any of the given inputs.

    Args:
      traced: what `jax.make_jaxpr` returns.
      inputs: numbers of flat inputs.
    """
    chosen = set(inputs)
    jaxpr = _open(traced)
    return _results(jaxpr, [number in chosen for number in range(len(jaxpr.invars))])


def without(function: Callable[[Tree, Tree], jax.Array], unused: Tree, used: Tree) -> jax.Array:
    """`function(unused, used)`, a scalar that does not depend on `unused`, of which only abstract values are given.

    Only the operations that lead to the result are run, so that nothing is printed or called back for made-up values.
    What is left of `unused` then (in a loop that computes other things too) is zeros, and XLA drops it.
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


def _open(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one; newer versions of JAX have one kind only."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _results(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which results depend on the flagged inputs."""
    flagged = {var for var, flag in zip(jaxpr.invars, flags, strict=True) if flag}

    def read(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in flagged

    for equation in jaxpr.eqns:
        here = [read(atom) for atom in equation.invars]
        if not any(here):
            continue
        mutable = [atom for atom in equation.invars if "Ref" in type(atom.aval).__name__]
        results = [True] * len(equation.outvars) if mutable else _through(equation, here)
        flagged.update(var for var, flag in zip(equation.outvars, results, strict=True) if flag)
        flagged.update(atom for atom in mutable)  # it may have been written to
    return [read(atom) for atom in jaxpr.outvars]


def _through(equation: Any, flags: list[bool]) -> list[bool]:
    """Which results of an equation depend on its flagged inputs, of which there is at least one."""
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


def _while(params: Any, flags: list[bool]) -> list[bool]:
    condition, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    of_condition, of_body, carry = flags[:first], flags[first:second], flags[second:]
    while True:
        if any(_results(condition, of_condition + carry)):
            return [True] * len(carry)  # how often it runs decides on everything
        after = [old or new for old, new in zip(carry, _results(body, of_body + carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _scan(equation: Any, body: Any, flags: list[bool]) -> list[bool]:
    """Inputs are constants, carry, slices; results are carry, slices. A slice has one dim less inside than outside."""

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
