"""Engines and data for tests that train."""

import jax
import optax

import jaxpipe
from tests.models import make_batch

M = 3


def engine_for(module, stages=1, data=1, optimizer=None, key=None, trainable=None, **config):
    example = tuple(a[0] for a in make_batch(1))
    return jaxpipe.initialize(
        module,
        optimizer or optax.adamw(1e-2),
        mesh=jaxpipe.make_mesh(pipe=stages, data=data),
        example=example,
        config={"num_micro_batches": M, **config},
        key=jax.random.key(5) if key is None else key,
        trainable=trainable,
    )


def batches(steps, first=0):
    return [make_batch(M, seed=step) for step in range(first, first + steps)]


def stream(items):
    for inputs, labels in items:
        yield from zip(inputs, labels, strict=True)
