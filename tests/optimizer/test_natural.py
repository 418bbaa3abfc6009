"""Params trees and natural trees: each leaf of one is found in the other."""

import jax
import numpy as np
import optax

from jaxpipe.optimizer.natural import abstract
from tests.compare import assert_close
from tests.optimizer.layouts import BLOCKS, random_params, tree

TREE = tree()


def test_one_entry_per_layer_that_owns_weights_in_its_own_shapes():
    assert list(TREE.shapes) == ["layer_000", "layer_002", "layer_003", "layer_004", "layer_005"]
    assert {name: leaf.shape for name, leaf in TREE.shapes["layer_003"].items() if leaf} == {"w": (4, 4), "b": (4,)}
    assert TREE.shapes["layer_003"]["steps"] is None, "no optimizer sees integers"
    assert TREE.layer_of["layer_005"] == 5


def test_values_are_read_from_their_places():
    params = random_params()
    natural = TREE.read(params)
    (stack,) = TREE.layout.stacks.values()
    for layer in BLOCKS:
        np.testing.assert_array_equal(
            natural[f"layer_{layer:03d}"]["w"], params["stacked"]["Block"]["w"][stack.places[layer]]
        )
    np.testing.assert_array_equal(natural["layer_000"]["e"], params["shared"]["0_Embed"]["e"])


def test_cells_and_back():
    params = random_params()
    back = TREE.params(TREE.cells(params))
    params["stacked"]["Block"]["steps"] = np.zeros_like(params["stacked"]["Block"]["steps"])  # is not seen
    assert_close(back, params, 0)


def test_places_are_in_the_order_of_the_natural_tree():
    leaves = jax.tree_util.tree_flatten_with_path(TREE.shapes)[0]
    assert [place.layer for place in TREE.places] == [TREE.layer_of[path[0].key] for path, _ in leaves]
    homes = {place.layer: place.home for place in TREE.places}
    assert homes == {0: None, **{layer: ("Block", layer) for layer in BLOCKS}}
    assert {place.cell for place in TREE.places} == set(TREE.cells(random_params()))


def test_what_is_a_params_tree():
    params = random_params()
    pair = optax.LookaheadParams(params, params)
    assert TREE.is_params(params) and TREE.holds_params(pair) and not TREE.is_params(pair)
    for other in ({**params, "shared": {}}, params["stacked"], None, 3, TREE.shapes):
        assert not TREE.holds_params(other)
    assert TREE.is_natural(TREE.shapes) and not TREE.is_natural(params) and not TREE.is_natural({})


def test_params_trees_inside_of_others_are_replaced():
    params = random_params()
    found = TREE.natural_shapes({"pair": (params, params), "rate": np.float32(1)})
    assert found["pair"] == (TREE.shapes, TREE.shapes) and found["rate"].shape == ()
    parts, rebuild = TREE.split({"a": params, "b": 1})
    assert parts == [params, 1] and rebuild([1, 2]) == {"a": 1, "b": 2}


def test_weak_types_are_told():
    assert abstract(1.0).weak_type and not abstract(np.float32(1)).weak_type
    assert abstract(abstract(1.0)) == abstract(1.0)
