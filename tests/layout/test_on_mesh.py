"""From rules to a layout, and what it says about further axes."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.layout.on_mesh import in_words, layout_on, left_to_the_compiler, parts_of
from jaxpipe.layout.placement import Placement


def layer(name):
    shapes = {"up": (4, 8), "bias": (8,)}
    return jaxpipe.Layer(lambda key, x: {n: jnp.ones(s) for n, s in shapes.items()}, lambda p, x: x @ p["up"], name)


BLOCK = layer("Block")
PARAMS = [{"up": jax.ShapeDtypeStruct((4, 8), jnp.float32), "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}] * 4


def layout(rules, entries=(BLOCK,) * 4, data=2, **options):
    module = jaxpipe.PipelineModule(list(entries), jnp.mean, sharding=rules)
    return layout_on(jaxpipe.make_mesh(pipe=2, data=data, model=2), module, (0, 2, 4), PARAMS, **options)


def test_like_layers_are_one_stack_if_rules_say_the_same_about_them():
    same = layout([("up", P(None, "model")), ("bias", P("model"))])
    assert same.specs["stacked"]["Block"] == {"up": P("pipe"), "bias": P("pipe")}
    full = jax.tree.map(lambda placement: placement.spec, same.placements["stacked"]["Block"])
    assert full == {"up": P("pipe", None, None, "model"), "bias": P("pipe", None, "model")}
    apart = layout([("layer_00[02]/up", P(None, "model"))])
    assert [sorted(stack.places) for stack in apart.stacks.values()] == [[0, 2], [1, 3]]


def test_a_layer_on_its_own_is_cut_over_the_ranks_along_another_dim():
    module = [BLOCK, BLOCK, layer("Other"), jnp.sin]
    placements = (
        layout([("layer_002/up", P(None, "model")), ("layer_002/bias", P("model"))], module)
        .shared["2_Other"]
        .placements
    )
    assert placements["up"].cuts == (("model", 1), ("pipe", 0))
    assert placements["bias"].spec == P(("pipe", "model"))


def test_with_zero_stage_the_data_ranks_cut_what_is_left():
    """Rather along a dim that the ranks cut than along one that a further axis does."""
    stack = layout([("up", P(None, "model"))], zero_stage=1).stacks["Block"]
    assert stack.placements["up"].cuts == (("model", 1), ("data", 0))
    module = [BLOCK, BLOCK, layer("Other"), jnp.sin]
    alone = layout([("layer_002/up", P(None, "model"))], module, zero_stage=1).shared["2_Other"].placements
    assert alone["up"].cuts == (("model", 1), ("pipe", 0), ("data", 0))


def test_what_is_left_to_the_compiler():
    placement = Placement((("pipe", 0), ("expert", 2), ("data", 1), ("model", 2)))
    assert left_to_the_compiler(placement).cuts == (("expert", 2), ("model", 2))
    assert parts_of(placement, {"pipe": 5, "data": 7, "expert": 2, "model": 3}) == 6


def test_words():
    placed = {"up": Placement((("model", 1), ("pipe", 0))), "down": {"w": Placement((("model", 1),))}, "b": Placement()}
    assert in_words(placed) == ["over model along dim 1: down/w, up"]
    assert in_words(Placement((("model", 0),))) == ["over model along dim 0: it"]


def test_linen_modules_have_to_be_tried_first():
    with pytest.raises(LayerError, match=r"layer 1 \(Dense\): .*Call pipe.check\(example\) before pipe.from_layers"):
        layout([], (BLOCK, jaxpipe.LayerSpec(linen.Dense, 4), BLOCK, BLOCK))
