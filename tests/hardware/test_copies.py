"""Copies in HLO text, and what they move."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.hardware import copies
from jaxpipe.hardware.copies import Copy, Known, find
from jaxpipe.hardware.hlo import Shape, parse
from jaxpipe.hardware.structure import blocks
from tests.hardware import texts


def aval(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


KNOWN = Known(
    {
        copies.WEIGHTS: {"stack": aval(jnp.bfloat16, 3, 256, 256), "head": aval(jnp.float32, 9, 4)},
        copies.GRADIENTS: {"stack": aval(jnp.float32, 3, 256, 256), "head": aval(jnp.float32, 9, 4)},
        copies.SAVED: {"x": aval(jnp.bfloat16, 4, 2, 128, 256)},
        copies.MESSAGE: [aval(jnp.bfloat16, 128, 256)],
    }
)


def found(text):
    module = parse(text)
    return [one for block in blocks(module) for one in find(module, block, KNOWN)]


def test_copies_in_ticks():
    """A fetch into a faster memory is none, and neither is what is before or after the ticks."""
    assert found(texts.TPU) == [
        Copy("message", "bf16[128,256]", 128 * 256 * 2, 1, 60, "loop"),
        Copy("weights", "bf16[256,256]", 256 * 256 * 2, 1, 50, "backward"),
    ]
    outside = texts.TPU.replace("fusion(%summed, %norm), kind=kLoop, calls=%fused_zeros", "copy(%summed)")
    assert found(outside) == found(texts.TPU)


def test_a_transpose_is_a_copy():
    assert found(texts.GPU) == [Copy("weights", "bf16[256,256]", 256 * 256 * 2, 1, 0, "forward")]


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        (Shape("bf16", (256, 1, 3, 256)), "weights"),
        (Shape("f32", (256, 256)), "gradients"),
        (Shape("f32", (4, 9)), "weights or gradients"),
        (Shape("bf16", (4, 2, 128, 256)), "saved"),
        (Shape("f32", (128, 256)), "other"),
        (Shape("s32", ()), "other"),
    ],
)
def test_what_an_array_is(shape, what):
    assert KNOWN.what(shape) == what
