"""Two ways to write the cross entropy, and what the TPU compiler makes of each: bytes and cycles of head and loss.

    .venv-tpu/bin/python benchmarks/label_logit.py      # in an environment with jaxpipe[tpu]

The head of the GPT of `gpt.py` (width 1024, vocabulary 32,000, 4 rows of 1024 tokens, bfloat16) on one v5e, with the
gradients of its kernel and its input. Nothing runs on a TPU, and the figures do not depend on the machine.
"""

import os
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

import jaxpipe
from jaxpipe.hardware import hlo

WIDTH, VOCABULARY, ROWS, LENGTH = 1024, 32_000, 4, 1024


def gathered(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The logit of each label: a gather, which needs an array to read from."""
    return jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]


def masked(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The same as a sum over a mask, which is fused with what makes the logits."""
    places = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(places == labels[..., None], logits, 0).sum(-1)


def report(pick: Callable[[jax.Array, jax.Array], jax.Array]) -> str:
    """One line of figures."""

    def loss(kernel: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = (x @ kernel).astype(jnp.float32)
        return (jax.nn.logsumexp(logits, -1) - pick(logits, labels)).mean()

    place = jax.sharding.SingleDeviceSharding(jaxpipe.topology("v5e:1x1")[0])
    shapes = [((WIDTH, VOCABULARY), jnp.bfloat16), ((ROWS, LENGTH, WIDTH), jnp.bfloat16), ((ROWS, LENGTH), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    module = hlo.parse(compiled.as_text())
    cycles = sum(instruction.cycles for instruction in module.computations[module.entry])
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return f"{pick.__name__}: temporary {temporary / 1e6:.1f} MB, {cycles / 1e6:.2f} million cycles"


if __name__ == "__main__":
    for pick in (gathered, masked):
        print(report(pick), flush=True)
