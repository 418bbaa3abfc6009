"""A training state of the small model of `tests/optimizer/layouts.py`, with Adam, and what writes and reads it."""

import functools

import jax
import optax

from jaxpipe.checkpoint import save
from jaxpipe.checkpoint.homes import Homes
from jaxpipe.checkpoint.write import Order
from jaxpipe.model.shapes import is_key
from jaxpipe.optimizer.arguments import checked
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.processes.group import Group
from jaxpipe.training.config import Config
from jaxpipe.training.state import make_state
from tests.optimizer.layouts import layout, mesh, random_params

COUNTERS = {"train_calls": 7, "micro_batches_seen": 21, "data_state": None, "client_state": {"epoch": 3}}


@functools.cache
def layerwise():
    shapes = layout().shapes()
    return Layerwise(checked(optax.adam(1e-2)), layout(), mesh(), shapes, {})


def state(seed=0):
    """(state, shardings); the moments are random, too, so that none may stand for another."""
    made, shardings = make_state(random_params(seed), layerwise(), jax.random.key(seed), mesh())
    leaves, structure = jax.tree.flatten(made)
    for number, leaf in enumerate(leaves):
        if jax.dtypes.issubdtype(leaf.dtype, jax.numpy.floating):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), leaf.shape, leaf.dtype)
            leaves[number] = jax.device_put(noise, leaf.sharding)
    return jax.tree.unflatten(structure, leaves), shardings


def words(tree):
    """The tree with keys as the words that they are made of."""
    return jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, tree)


def homes(of):
    return Homes(layout(), of, layerwise().plan, mesh())


def manifest_of(of):
    return save.describe(homes(of), of, Config(), **COUNTERS)


def order(directory, tag, **options):
    return Order(directory, tag, **{"save_latest": True, "keep": None, "blocking": True, **options})


def write(directory, tag, of, **options):
    """A checkpoint of a state."""
    saver = save.Saver()
    path = saver.start(order(directory, tag, **options), manifest_of(of), homes(of).items(of), Group.of(mesh()))
    saver.wait()
    return path
