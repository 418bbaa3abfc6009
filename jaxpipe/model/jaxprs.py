"""What several modules know about jaxprs: their equations, the bodies of these, and which primitives only call one."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# Primitives that run one body on their own inputs, and return what it returns.
CALLS = frozenset(
    {
        "checkpoint",
        "closed_call",
        "core_call",
        "core_closed_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "jit",
        "pjit",
        "remat",
        "remat2",
    }
)


def opened(jaxpr: Any) -> Jaxpr:
    """The jaxpr inside a closed one, and any other value as it is. In newer versions of JAX the two are one class."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def bodies(equation: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs that an equation holds, in the order of its parameters."""
    found: list[Jaxpr] = []
    for value in equation.params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(opened(body), "eqns"):
                found.append(opened(body))
    return found


def equations(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a jaxpr, including those in the bodies of its equations."""
    for equation in opened(jaxpr).eqns:
        yield equation
        for body in bodies(equation):
            yield from equations(body)


def scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """How many inputs of a `scan` are constants, and how many are carried; what is scanned over comes behind them.

    Told by shapes, because versions of JAX name the counts differently: an array that is scanned over has one dim more
    outside of the loop than inside.
    """
    [body] = bodies(equation)

    def sliced(outer: list[Any], inner: list[Any]) -> int:
        return sum(len(a.aval.shape) != len(b.aval.shape) for a, b in zip(outer, inner, strict=True))

    num_carry = len(body.outvars) - sliced(equation.outvars, body.outvars)
    return len(body.invars) - sliced(equation.invars, body.invars) - num_carry, num_carry
