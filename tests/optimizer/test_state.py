"""Where each leaf of an optimizer's state is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxpipe.optimizer.state import StatePlan, place_state, unnamed
from tests.optimizer.layouts import BLOCKS, mesh, tree

TREE = tree()


def placed(tx, homes=None):
    state = jax.eval_shape(tx.init, TREE.shapes)
    return place_state(state, TREE, homes), jax.tree.structure(state)


def by_name(leaves):
    return {jax.tree_util.keystr(leaf.path): leaf for leaf in leaves}


def test_moments_lie_with_their_layers_and_counts_once():
    leaves, _ = placed(optax.adam(1e-3))
    found = by_name(leaves)
    count, mine, alone = found["[0].count"], found["[0].mu['layer_003']['w']"], found["[0].nu['layer_000']['e']"]
    assert (count.layer, count.stack, count.like) == (None, None, None)
    assert (mine.home, mine.like) == (("Block", 3), "['layer_003']['w']")
    assert jax.tree_util.keystr(mine.before) == "[0].mu" and jax.tree_util.keystr(mine.inside) == "['w']"
    assert (alone.layer, alone.home, alone.like) == (0, None, "['layer_000']['e']")
    assert len({leaf.name for leaf in leaves if leaf.home == ("Block", 4)}) == 4, "two moments of w and of b"
    assert not unnamed(leaves)


def test_labels_share_stacks():
    """Layers that are given to different optimizers: their moments are of one stack, not of one per label."""
    tx = optax.multi_transform(
        {"a": optax.adam(1.0), "b": optax.sgd(1.0, 0.9)}, lambda t: {k: "ab"[int(k[-1]) % 2] for k in t}
    )
    leaves, _ = placed(tx)
    names = {layer: {leaf.name for leaf in leaves if leaf.home == ("Block", layer)} for layer in BLOCKS}
    assert names[3] == names[5] < names[2] == names[4]
    assert len(names[2]) == 4


def test_leaves_without_a_name_are_placed_by_use():
    tx = optax.GradientTransformation(
        lambda p: [jnp.zeros_like(a) for a in jax.tree.leaves(p)], lambda g, s, p=None: (g, s)
    )
    leaves, _ = placed(tx)
    assert unnamed(leaves) and all(leaf.home is None for leaf in leaves)
    homes = [place.home for place in TREE.places]
    leaves, _ = placed(tx, homes)
    assert [leaf.home for leaf in leaves] == homes
    assert all("by use" in leaf.name for leaf in leaves if leaf.home)


@pytest.mark.parametrize("key", ["layer_999", "layer_00", "other"])
def test_names_that_are_no_layers(key):
    leaves = place_state({key: {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}, TREE)
    assert leaves[0].layer is None


def test_stored_and_back_and_where_it_lies():
    leaves, structure = placed(optax.adam(1e-3))
    plan = StatePlan(TREE, structure, leaves)
    (stack,) = TREE.layout.stacks.values()
    number = np.arange(2 * stack.slots).reshape(2, stack.slots)
    stacked = {
        (leaf.stack, leaf.name): np.tile(number[..., *[None] * leaf.aval.ndim], (1, 1, *leaf.aval.shape))
        for leaf in leaves
        if leaf.home
    }
    rest = {leaf.name: np.full(leaf.aval.shape, number) for number, leaf in enumerate(leaves) if not leaf.home}
    state = plan.stored(stacked, rest)
    natural = plan.natural(state)
    for layer, (rank, slot) in stack.places.items():
        assert (natural[0].mu[f"layer_{layer:03d}"]["w"] == rank * stack.slots + slot).all()
    assert natural[0].count == rest["[0].count"]
    shardings = plan.shardings(mesh())
    assert {sharding.spec for sharding in shardings.stacked["Block"].values()} == {PartitionSpec("pipe")}
    params = TREE.layout.shardings(mesh())["shared"]["0_Embed"]["e"]
    assert shardings.rest["[0].mu['layer_000']['e']"] == params and params.spec == PartitionSpec("pipe")
    assert shardings.rest["[0].count"].spec == PartitionSpec()
