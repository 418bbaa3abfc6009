"""The state of the layers of a pipeline: when its shapes are known, and what is brought onto the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import LayerError
from tests.compare import assert_close


def init(key, x):
    return {"w": jnp.ones(3)}, {"mean": jnp.zeros(x.shape[1:])}


SEEN = jaxpipe.Layer(init, lambda p, s, x: (x * p["w"][None], {"mean": s["mean"] + x.mean(0)}), "Seen", stateful=True)
X = np.ones((2, 4, 3), np.float32)
MESH = jaxpipe.make_mesh(pipe=2)


def pipeline():
    module = jaxpipe.PipelineModule([SEEN] * 3, lambda y, t: y.mean(), partition_method=[0, 1, 3])
    return jaxpipe.Pipeline(module, MESH, 2)


def test_shapes_are_learnt_from_the_first_inputs():
    pipe = pipeline()
    pipe.from_layers([{"w": np.ones(3, np.float32)}] * 3)
    assert pipe.layout.states is None, "params alone do not tell"
    pipe.states.see(X)
    first = pipe.states.layout
    pipe.states.see(np.ones((2, 8, 3), np.float32))
    assert pipe.states.layout is first
    assert jax.tree.map(lambda a: a.shape, pipe.states.avals()["stacked"]) == {"Seen": {"mean": (2, 2, 3)}}


def test_a_list_is_brought_onto_the_mesh_and_a_tree_is_taken_as_it_is():
    pipe = pipeline()
    pipe.init(0, X[0])
    each = [{"mean": np.full(3, index, np.float32)} for index in range(3)]
    tree = pipe.states.brought(each)
    assert pipe.states.brought(tree) is tree
    assert_close(pipe.to_layers(tree), each, 0)
    with pytest.raises(LayerError, match="inside of a jit.*pass the tree"):
        jax.jit(pipe.states.brought)(each)
