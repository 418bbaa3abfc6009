"""A small model, cut into two stages: a layer that occurs once, one without weights, and four like ones, padded.

rank 0 | Embed, tanh, Block 2
rank 1 | Block 3, Block 4, Block 5
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.layout.layout import Layout
from jaxpipe.optimizer.natural import NaturalTree

BLOCKS = (2, 3, 4, 5)
X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def block(key, x):
    return {"w": jax.random.normal(key, (4, 4)), "b": jnp.zeros(4), "steps": jnp.zeros((), jnp.int32)}


EMBED = jaxpipe.Layer(lambda key, x: {"e": jax.random.normal(key, (6, 4))}, lambda params, x: x, "Embed")
BLOCK = jaxpipe.Layer(block, lambda params, x: x, "Block")


def layout():
    module = jaxpipe.PipelineModule([EMBED, jnp.tanh, *[BLOCK] * 4])
    return Layout(module, (0, 3, 6), [shapes.params for shapes in module.shapes(X)])


def tree():
    return NaturalTree(layout())


def mesh():
    return jaxpipe.make_mesh(pipe=2)


def random_params(seed=0):
    """A params tree, with zeros in the padding."""
    rng, made = np.random.default_rng(seed), layout()
    params = jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape), a.dtype), made.shapes())
    (stack,) = made.stacks.values()
    used = np.zeros((2, stack.slots), bool)
    for place in stack.places.values():
        used[place] = True
    for leaf in jax.tree.leaves(params["stacked"]):
        leaf[~used] = 0
    return jax.tree.map(jax.device_put, params, made.shardings(mesh()))
