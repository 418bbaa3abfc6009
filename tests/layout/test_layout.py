"""Where weights live: layers into the params tree and back, at any cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.layout.checks import check_params
from jaxpipe.layout.layout import Address, Layout, is_stack
from jaxpipe.layout.placement import Placement
from tests.compare import assert_close


def block(name):
    return jaxpipe.Layer(block_init, block_apply, name)


def block_init(key, x):
    return {}


def block_apply(p, x):
    return x


def odd_init(key, x):
    return {}


ODD = jaxpipe.Layer(odd_init, block_apply, "Odd")


def make():
    return ODD


ENTRIES = [
    jaxpipe.TiedLayerSpec("tie", make),
    block("block_0"),
    jnp.tanh,
    block("block_1"),
    ODD,
    block("block_2"),
    block("block_3"),
    jaxpipe.TiedLayerSpec("tie", make, forward_fn=lambda p, x: x),
]
rng = np.random.default_rng(0)


def block_params(layer):
    return {"w": np.full((2, 3), layer, np.float32), "ids": np.asarray([layer, 7], np.int32), "none": None}


# Per layer, params that say whose they are.
LAYERS = [
    {"table": rng.normal(size=(5, 12, 24)).astype(np.float32), "bias": np.ones(5, np.float32), "on": np.True_},
    block_params(1),
    {},
    block_params(3),
    {
        "nothing": np.zeros(0, np.float32),
        "empty": np.zeros((0, 12), np.float32),
        "k": rng.normal(size=(12, 7)).astype(np.float32),
    },
    block_params(5),
    block_params(6),
    {},
]
MODULE = jaxpipe.PipelineModule(ENTRIES)
boundaries = st.sets(st.integers(1, 7), max_size=4).map(lambda cuts: (0, *sorted(cuts), 8))


@settings(max_examples=8)
@given(boundaries)
def test_layers_come_back_from_any_cut(cuts):
    layout, mesh = Layout(MODULE, cuts, LAYERS), jaxpipe.make_mesh(pipe=len(cuts) - 1)
    params = layout.from_layers(mesh, LAYERS)
    check_params(layout, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda a: a.shape, layout.shapes())
    assert jax.tree.map(lambda a: a.sharding, params) == layout.shardings(mesh)
    back = jax.device_get(layout.to_layers(params))
    for found, wanted in zip(back, LAYERS, strict=True):
        assert_close(found, jax.tree.map(np.asarray, wanted), 0)
    (stack,) = layout.stacks.values()
    assert stack.name == "block" and stack.slots == max(
        sum(start <= layer < stop for layer in (1, 3, 5, 6)) for start, stop in zip(cuts, cuts[1:], strict=False)
    )
    whole = np.asarray(params["stacked"]["block"]["ids"])
    padding = set(np.ndindex(whole.shape[:2])) - set(stack.places.values())
    assert all((whole[place] == 0).all() for place in padding)
    for layer, (rank, slot) in stack.places.items():
        assert cuts[rank] <= layer < cuts[rank + 1] and whole[rank, slot, 0] == layer


def test_addresses():
    layout = Layout(MODULE, (0, 3, 5, 8), LAYERS)
    tie, stack, odd = Address("shared", "0_Odd"), Address("stacked", "block"), Address("shared", "4_Odd")
    assert [layout.address_of(layer) for layer in range(8)] == [tie, stack, None, stack, odd, stack, stack, tie]
    assert [layout.stage_of(layer) for layer in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]


def test_single_layers_are_cut_along_the_largest_dim_that_the_ranks_divide():
    shared = {s.layer: s.placements for s in Layout(MODULE, (0, 1, 2, 8), LAYERS).shared.values()}
    assert shared[0] == {"table": Placement((("pipe", 2),)), "bias": Placement(), "on": Placement()}
    assert shared[4] == {"nothing": Placement(), "empty": Placement((("pipe", 1),)), "k": Placement((("pipe", 0),))}
    five = {s.layer: s.placements for s in Layout(MODULE, (0, 1, 2, 3, 4, 8), LAYERS).shared.values()}
    assert five[0] == {"table": Placement((("pipe", 0),)), "bias": Placement((("pipe", 0),)), "on": Placement()}
    one = Layout(MODULE, (0, 8), LAYERS)
    assert {str(p) for s in one.shared.values() for p in jax.tree.leaves(s.placements)} == {str(Placement())}


AXES = {"pipe": 3, "data": 2, "model": 4}


def test_with_zero_stage_1_everything_is_cut_over_the_data_ranks():
    layout = Layout(MODULE, (0, 3, 5, 8), LAYERS, AXES, 1)
    shared = {s.layer: s.placements for s in layout.shared.values()}
    assert shared[0] == {
        "table": Placement((("pipe", 2), ("data", 1))),  # an even cut over a dim that no other axis cuts
        "bias": Placement((("data", 0),), ((0, 6),)),
        "on": Placement(),
    }
    assert shared[4]["k"] == Placement((("pipe", 0), ("data", 0))), "rather twice the same dim than padding"
    (stack,) = layout.stacks.values()
    assert stack.placements == {"w": Placement((("data", 0),)), "ids": Placement((("data", 0),)), "none": None}
    shapes, specs = layout.shapes(), layout.specs
    assert shapes["shared"]["0_Odd"]["bias"].shape == (6,) and layout.own_shapes()["shared"]["0_Odd"]["bias"].shape == (
        5,
    )
    assert specs["stacked"]["block"]["w"] == P("pipe", None, "data") and specs["shared"]["4_Odd"]["k"] == P(
        ("pipe", "data")
    )
    assert layout.cuts_data and layout.axes_within_ranks() == {"data"}
    for same in (Layout(MODULE, (0, 8), LAYERS, {"pipe": 1}, 1), Layout(MODULE, (0, 8), LAYERS, AXES)):
        assert not same.cuts_data and same.specs == Layout(MODULE, (0, 8), LAYERS).specs
    mesh = jaxpipe.make_mesh(pipe=3, data=2)
    params = layout.from_layers(mesh, LAYERS)
    check_params(layout, params)
    assert jax.tree.map(lambda a: a.sharding, params) == layout.shardings(mesh)
    for found, wanted in zip(jax.device_get(layout.to_layers(params)), LAYERS, strict=True):
        assert_close(found, jax.tree.map(np.asarray, wanted), 0)


def test_further_axes_are_left_to_the_compiler():
    """Their specs are for the dims that a layer made; layers that are cut in different ways are no stack."""

    def own_spec(layer, path, leaf):
        if path[-1].key == "table":
            return P(None, "model")
        return P(None, ("model",)) if path[-1].key == "w" and layer in (1, 3) else None

    layout = Layout(MODULE, (0, 3, 5, 8), LAYERS, AXES, 1, own_spec)
    table = layout.shared["0_Odd"].placements["table"]
    assert table == Placement((("model", 1), ("pipe", 2), ("data", 2)))
    assert table.spec == P(None, "model", ("pipe", "data")) and table.manual_spec == P(None, None, ("pipe", "data"))
    assert {tuple(stack.places) for stack in layout.stacks.values()} == {(1, 3), (5, 6)}
    assert layout.axes_within_ranks() == {"data", "model"}


def test_which_leaves_hold_several_layers():
    layout = Layout(MODULE, (0, 8), LAYERS)
    paths = jax.tree_util.tree_flatten_with_path(layout.shapes())[0]
    assert {(path[1].key, is_stack(path)) for path, _ in paths} == {
        ("block", True),
        (layout.address_of(0).name, False),
        ("4_Odd", False),
    }


def test_what_does_not_fit_is_refused():
    later = [*LAYERS[:-1], {"table": np.ones(3)}]
    with pytest.raises(LayerError, match=r"layer 7 .* is tied to layer 0 .*which\s+holds them"):
        Layout(MODULE, (0, 8), later)
    with pytest.raises(LayerError, match=r"layer 1 \(block_0\) has a PRNG key among its params"):
        Layout(MODULE, (0, 8), [LAYERS[0], {"k": jax.random.key(0)}, *LAYERS[2:]])


def test_one_layer_at_a_time():
    layout, mesh = Layout(MODULE, (0, 3, 5, 8), LAYERS), jaxpipe.make_mesh(pipe=3)
    params = layout.from_layers(mesh, LAYERS)
    for index in layout.owned(params):
        assert_close(layout.layer(params, index), jax.tree.map(np.asarray, LAYERS[index]), 0)
    assert list(layout.owned(params)) == [0, 1, 3, 4, 5, 6]
    # With one process on all devices, so that layers of different ranks can be computed with at once.
    blocks = [layout.layer(params, layer)["w"] for layer in layout.stacks["block"].places]
    assert jax.jit(lambda *arrays: sum(a.sum() for a in arrays))(*blocks).shape == ()
    assert layout.layer(params, 0)["table"] is params["shared"]["0_Odd"]["table"], "as it lies"
