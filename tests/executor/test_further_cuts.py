"""What keeps arrays cut over further axes, by the shapes on each device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor.further_cuts import FurtherCuts
from jaxpipe.layout.on_mesh import layout_on
from jaxpipe.layout.placement import Placement
from jaxpipe.mesh import manual_axes

BLOCK = jaxpipe.Layer(lambda key, x: {"w": jnp.ones((4, 8)), "b": jnp.ones(6)}, lambda p, x: x, "Block")
HEAD = jaxpipe.Layer(lambda key, x: {"w": jnp.ones((4, 8))}, lambda p, x: x, "Head")


def cuts(**axes):
    module = jaxpipe.PipelineModule([BLOCK, BLOCK, HEAD], jnp.mean, sharding=[("w", P(None, "model"))])
    mesh = jaxpipe.make_mesh(pipe=2, **axes)
    layout = layout_on(
        mesh, module, (0, 1, 3), [jax.eval_shape(layer.init, jax.random.key(0), None) for layer in module.layers]
    )
    # Of the leaves in order: the head's, and those of the blocks, of which a rank holds [slots, ...].
    held = [Placement((("model", 1),)), None, Placement((("model", 2),))]
    return layout, mesh, FurtherCuts(layout, mesh, held)


@pytest.mark.parametrize("what", ["held", "stored"])
def test_arrays_are_cut_where_rules_say(what):
    layout, mesh, found = cuts(model=2)
    lead = (1,) if what == "held" else (1, 1)
    head = (4, 8) if what == "held" else (2, 8)
    tree = {
        "stacked": {"Block": {"b": np.ones((*lead, 6)), "w": np.ones((*lead, 4, 8))}},
        "shared": {"2_Head": {"w": np.ones(head)}},
    }
    assert jax.tree.structure(tree) == jax.tree.structure(layout.shapes())
    mapped = jax.shard_map(
        lambda tree: getattr(found, what)(jax.tree.map(jnp.sin, tree)),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names=manual_axes(mesh),
        check_vma=False,
    )
    parts = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, jax.jit(mapped)(tree))
    assert parts["stacked"]["Block"] == {"b": (*lead, 6), "w": (*lead, 4, 4)}
    assert parts["shared"]["2_Head"] == {"w": (head[0], 4)}
    assert jax.tree.leaves(found.held(tree))[0] is jax.tree.leaves(tree)[0]  # where no mesh is around


def test_nothing_is_added_where_an_axis_has_one_device():
    layout, mesh, found = cuts(model=1)
    tree = layout.shapes()
    assert found.held(tree) is tree and found.stored(tree) is tree


def test_bytes_on_a_device():
    layout, _, found = cuts(model=2)
    held = {"stacked": {"Block": {"b": (1, 6), "w": (1, 4, 8)}}, "shared": {"2_Head": {"w": (4, 8)}}}
    held = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), held, is_leaf=lambda x: type(x) is tuple
    )
    assert found.bytes_on_a_device(held) == 4 * (6 + 16 + 16)
    without = {**held, "shared": {"2_Head": {"w": None}}}
    assert found.bytes_on_a_device(without) == 4 * (6 + 16), "gradients of what is frozen are not there"
    del layout
