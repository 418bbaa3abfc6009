"""Layers of flax modules, called as the pipeline calls them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxpipe
from jaxpipe.model.context import Context
from jaxpipe.model.layers import bind

X = jnp.ones((4, 8))
KEY = jax.random.key(3)
Spec = jaxpipe.LayerSpec


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.dense(x))


def run(entry, train=True, key=KEY, x=X):
    (layer,) = bind([entry])
    params = layer.init(jax.random.key(0), x)
    context = Context(key if layer.uses_key else None)
    return jax.jit(lambda p, x, c: layer.apply(p, x, c, train)[0])(params, x, context)


def factor(entry, **options):
    return float(run(entry, **options)[0, 0])


def dropped(entry, **options):
    y = np.asarray(run(entry, **options))
    return bool((y == 0).any())
