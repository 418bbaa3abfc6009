"""Equations on arrays that are stored with padding, so that the data ranks have equal parts.

No transformation may see padding. But to cut it off, the parts of an array would have to be brought together. An
elementwise equation gives the same for the real entries if it runs on the padding as well, so it does, and what comes out
in the padding is never looked at. A sum runs on zeros there. All other equations get their operands without padding.

An array is padded if its shape is not the one that its value has in the trace.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpipe.layout.placement import fit
from jaxpipe.optimizer.trace import Equation
from jaxpipe.types import Shape

SUM = "reduce_sum"
# Primitives whose operands are scalars or all of one shape, and that have no parameter which tells a shape.
ELEMENTWISE = frozenset(
    "abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy cos "
    "cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p "
    "logistic lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n sign sin sinh "
    "sqrt square stop_gradient sub tan tanh xor".split()
)


def form(eqn: Equation, shapes: Sequence[Shape]) -> Shape | None:
    """The padded shape in which an equation can take its operands; None if they must have the shapes of the trace.

    Args:
      shapes: those in which its operands are there.
    """
    name = eqn.primitive.name
    if name != SUM and name not in ELEMENTWISE:
        return None
    own = [v.aval.shape for v in eqn.inputs]
    padded = [shape for shape, without in zip(shapes, own, strict=True) if shape != without]
    if not padded or len({shape for shape in own if shape}) > 1:
        return None
    return padded[0]


def operand(eqn: Equation, number: int, array: ArrayLike, padded: Shape | None, lead: int = 0) -> Any:
    """An operand in the shape in which the equation takes it.

    Args:
      padded: what `form` says.
      lead: so many dims in front are of no concern.
    """
    own = eqn.inputs[number].aval.shape
    ahead = np.shape(array)[:lead]
    array = fitted(array, (*ahead, *(own if padded is None or not own else padded)))
    return zeroed(array, (*ahead, *own)) if padded is not None and eqn.primitive.name == SUM else array


def compute(eqn: Equation, operands: Sequence[ArrayLike]) -> list[jax.Array]:
    """The outputs of an equation, of operands with or without padding."""
    padded = form(eqn, [np.shape(array) for array in operands])
    return eqn.bind(*[operand(eqn, number, array, padded) for number, array in enumerate(operands)])


def fitted(array: ArrayLike, shape: Shape) -> Any:
    """`fit` for whatever may be an operand."""
    return array if np.shape(array) == shape else fit(jnp.asarray(array), shape)


def zeroed(array: ArrayLike, shape: Shape) -> Any:
    """An array with zeros in the padding, which begins where `shape` ends; itself if it has none."""
    if np.shape(array) == shape:
        return array
    array, real = jnp.asarray(array), None
    for dim, (stored, size) in enumerate(zip(array.shape, shape, strict=True)):
        if stored > size:
            here = jax.lax.broadcasted_iota(jnp.int32, array.shape, dim) < size
            real = here if real is None else real & here
    return array if real is None else jnp.where(real, array, jnp.zeros_like(array))
