"""One call of a transformation: natural shapes to trace with, and where each value of them comes from."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.optimizer.call import Call
from tests.optimizer.layouts import BLOCKS, mesh, random_params, tree

TREE = tree()


def test_params_trees_become_natural_ones_and_the_rest_stays():
    call = Call(TREE, mesh())
    shapes = call.argument({"params": random_params(), "rate": np.float32(0.5)})
    assert shapes["params"] == TREE.shapes and shapes["rate"].shape == ()
    assert call.homes == [*[place.home for place in TREE.places], None], "in the order of the leaves of the shapes"


def test_the_same_function_of_two_arguments():
    params, grads = random_params(0), random_params(1)
    call = Call(TREE, mesh())
    arguments = call.argument(params), call.argument(grads), call.argument(jnp.float32(0.5))
    closed = jax.make_jaxpr(lambda p, g, rate: jax.tree.map(lambda p, g: p - rate * g, p, g))(*arguments)
    targets = [place.home and (*place.home, place.cell[1]) for place in TREE.places]
    stacked, rest = jax.jit(lambda: call.run(closed, targets))()
    wanted = jax.tree.map(lambda p, g: p - 0.5 * g, TREE.read(params), TREE.read(grads))
    (stack,) = TREE.layout.stacks.values()
    for layer in BLOCKS:
        found = stacked["Block", "['w']"][stack.places[layer]]
        np.testing.assert_allclose(found, wanted[f"layer_{layer:03d}"]["w"], rtol=1e-6)
    np.testing.assert_allclose(rest[0], wanted["layer_000"]["e"], rtol=1e-6)
