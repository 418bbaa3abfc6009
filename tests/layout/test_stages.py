"""Which layers are scanned together, and which stages are one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.layout.layout import Address, Layout
from jaxpipe.layout.stages import Part, make_stages, not_traced
from jaxpipe.model import keys
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.layers import Kind
from tests.compare import assert_close


def init(key, x):
    return {"w": jax.random.normal(key, (4, 4))}


def apply(p, x):
    return jnp.tanh(x @ p["w"])


BLOCK = jaxpipe.Layer(init, apply, "Block")
OTHER = jaxpipe.Layer(init, lambda p, x: x @ p["w"], "Other")
X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
MESH = jaxpipe.make_mesh(pipe=1)


def stages(entries, cuts, x=X, placement=None):
    module = jaxpipe.PipelineModule(entries)
    shapes = module.shapes(x, mesh=MESH)
    return make_stages(Layout(module, cuts, [each.params for each in shapes], placement=placement), shapes)


def sizes(stage):
    return [(part.offset, part.count, part.slot) for part in stage.parts]


def test_runs_of_like_layers():
    first, second = stages([BLOCK, BLOCK, jnp.sin, jnp.sin, BLOCK, BLOCK, OTHER, BLOCK], (0, 5, 8))
    assert sizes(first) == [(0, 2, 0), (2, 2, 0), (4, 1, 2)]
    assert sizes(second) == [(0, 1, 0), (1, 1, 0), (2, 1, 1)]
    assert [part.is_single for part in first.parts] == [False, False, False]
    assert [part.is_single for part in second.parts] == [False, True, False]
    assert second.parts[1].address == Address("shared", "6_Other") and second.parts[1].label == "layer 6 (Other)"
    assert first.parts[1].address is None and len(first.part_inputs) == len(first.parts)
    assert (first.is_first, first.is_last, second.is_first, second.is_last) == (True, False, False, True)


def test_slots_are_counted_from_the_first_one_of_the_stage():
    """So that stages of one rank that compute the same are one program; where each begins, the stage says."""
    made = stages([OTHER, *[BLOCK] * 3, OTHER, *[BLOCK] * 3], (0, 2, 4, 6, 8), placement=(0, 1, 0, 1))
    assert [sizes(stage) for stage in made] == [
        [(0, 1, 0), (1, 1, 0)],
        [(0, 2, 0)],
        [(0, 1, 0), (1, 1, 0)],
        [(0, 2, 0)],
    ]
    block, other = Address("stacked", "Block"), Address("stacked", "Other")
    assert [stage.slots for stage in made] == [{other: 0, block: 0}, {block: 0}, {other: 1, block: 1}, {block: 2}]
    assert made[1].program_key() != made[3].program_key(), "the last one has the loss"
    made = stages([BLOCK] * 12, (0, 2, 4, 6, 8, 10, 12), placement=(0, 1, 1, 0, 0, 1))
    assert len({stage.program_key() for stage in made[1:5]}) == 1
    assert [list(stage.slots.values()) for stage in made] == [[0], [0], [2], [2], [4], [4]]


def test_layers_without_weights_are_scanned_only_with_their_own_kind():
    (stage,) = stages([jnp.sin, jnp.cos, jnp.cos, jnp.sin], (0, 4))
    assert sizes(stage) == [(0, 1, 0), (1, 2, 0), (3, 1, 0)]


def test_like_layers_that_change_the_shape_or_share_weights_are_not_scanned():
    def half(x):
        return x[..., : max(1, x.shape[-1] // 2)]

    (stage,) = stages([half, half, half, half], (0, 4))
    assert sizes(stage) == [(0, 1, 0), (1, 1, 0), (2, 2, 0)], "4 > 2 > 1 > 1 > 1: the last two change no shape"
    assert [inputs.shape[-1] for inputs in stage.part_inputs] == [4, 2, 1]

    def make():
        return BLOCK

    tie = jaxpipe.TiedLayerSpec("tie", make)
    (stage,) = stages([tie, tie, tie], (0, 3))
    assert [part.count for part in stage.parts] == [1, 1, 1] and all(part.is_single for part in stage.parts)
    assert len({part.address for part in stage.parts}) == 1


def test_stages_that_look_the_same_are_one_program():
    made = stages([BLOCK] * 9, (0, 2, 4, 6, 9))
    first, middle, again, last = (stage.program_key() for stage in made)
    assert middle == again and len({first, middle, last}) == 3
    made = stages([BLOCK] * 4 + [OTHER] * 2, (0, 1, 2, 5, 6))
    assert made[1].program_key() != made[2].program_key()


@pytest.mark.parametrize("count", [1, 3])
def test_a_part_is_its_layers_one_after_the_other(count):
    def run(params, x, context):
        return jnp.sin(x @ params["w"]) + jax.random.normal(context.key, x.shape), Aux({"seen": x[0]})

    part = Part(Kind(init, run, uses_key=True), 2, count, run=run)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(count, 4, 4)).astype(np.float32)
    x = rng.normal(size=(2, 4)).astype(np.float32)
    root = jax.random.key(5)
    layer_keys = part.keys(root, jnp.int32(7))
    wanted = x
    for index in range(count):
        wanted, aux = run({"w": weights[index]}, wanted, Context(keys.layer_key(root, 7 + index)))
    found, beside = part.apply({"w": weights if count > 1 else weights[0]}, x, Context(layer_keys))
    assert_close(found, wanted, 1e-6)
    seen = beside.state["seen"] if count == 1 else beside.state["seen"][-1]
    assert_close(seen, aux.state["seen"], 1e-6)
    assert part.keys(None, jnp.int32(7)) is None
    assert Part(Kind(init, run), 2, count).keys(root, jnp.int32(7)) is None, "it looks at none"


def test_a_layer_that_was_not_traced_says_so():
    with pytest.raises(AssertionError, match="not traced on a mesh"):
        Part(Kind(init, apply), 0).apply({}, jnp.ones(2), Context())
    module = jaxpipe.PipelineModule([BLOCK])
    shapes = module.shapes(X)
    (stage,) = make_stages(Layout(module, (0, 1), [shapes[0].params]), shapes)
    assert stage.parts[0].run is not_traced
