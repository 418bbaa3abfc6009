"""A small model with everything, for plans and stage programs: three kinds of layers, integers, noise, all distinct."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.layout.init import init_params
from jaxpipe.layout.layout import Layout
from jaxpipe.lowering.lower import lower

ROWS, WIDTH = 4, 3


def _init(key, x):
    # Small weights: where a tanh is saturated, its derivative is little more than rounding.
    return {"w": jax.random.normal(key, (WIDTH, WIDTH)) / 4, "n": jnp.int32(2)}


def _block(p, x, *, key):
    h = jnp.tanh(x["h"] @ p["w"]) * p["n"].astype(jnp.float32)
    if key is not None:
        h = h + jax.random.uniform(key, h.shape)
    return {**x, "h": h}


def _start(p, ids):
    return {"h": p["w"][ids % WIDTH], "ids": ids, "none": None}


def _head(p, x):
    return (x["h"] * x["ids"][:, None].astype(jnp.float32)) @ p["w"]


def loss(y, t):
    return ((y - t) ** 2).mean()


BLOCK = jaxpipe.Layer(_init, _block, "Block")
LAYERS = [jaxpipe.Layer(_init, _start, "Start"), *[BLOCK] * 4, jaxpipe.Layer(_init, _head, "Head")]
MODULE = jaxpipe.PipelineModule(LAYERS, loss)


def make_batch(num_micro_batches, rows=ROWS, seed=0):
    """Inputs and labels [M, B, ...], every micro-batch different."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 20, (num_micro_batches, rows)).astype(np.int32)
    return ids, rng.normal(size=(num_micro_batches, rows, WIDTH)).astype(np.float32)


def prepared(cuts, schedule, data=1, module=MODULE):
    """(layout, mesh, program, params) of the model cut at `cuts`; the schedule is `schedules.x(stages, micro-batches)`."""
    mesh = jaxpipe.make_mesh(pipe=len(cuts) - 1, data=data)
    shapes = module.shapes(jax.ShapeDtypeStruct((ROWS // data,), jnp.int32), mesh=mesh)
    layout = Layout(module, cuts, [each.params for each in shapes])
    return layout, mesh, lower(schedule), init_params(layout, mesh, jax.random.key(3), shapes)
