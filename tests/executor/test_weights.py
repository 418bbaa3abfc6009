"""What ranks compute with: into it and back are transposes, and parts take and add by address."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor.weights import Weights
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.placement import fit
from jaxpipe.layout.stages import Part
from jaxpipe.model.precision import Precision
from tests.compare import assert_close

rng = np.random.default_rng(0)


def floats(*shape):
    return rng.normal(size=shape).astype(np.float32)


def init(key, x):
    return {}


def apply(p, x):
    return x


BLOCK = jaxpipe.Layer(init, apply, "Block")
ODD = jaxpipe.Layer(lambda key, x: {}, apply, "Odd")
MODULE = jaxpipe.PipelineModule([ODD, BLOCK, BLOCK, jnp.tanh, BLOCK])
LAYERS = [
    {"cut": floats(6, 4), "whole": floats(3), "ids": np.arange(4, dtype=np.int32)},
    {"w": floats(2, 2), "n": np.int32(1)},
    {"w": floats(2, 2), "n": np.int32(2)},
    {},
    {"w": floats(2, 2), "n": np.int32(4)},
]
KIND = MODULE.layers[1].kind
RANK = np.int32(0)


@pytest.mark.parametrize(
    ("cuts", "data", "zero"),
    [((0, 3, 5), 2, 0), ((0, 5), 2, 0), ((0, 5), 1, 0), ((0, 1, 3, 5), 1, 0), ((0, 3, 5), 2, 1), ((0, 5), 3, 1)],
    ids=str,
)
def test_into_it_and_back_are_transposes(cuts, data, zero):
    """The sum over devices of held times gradient is the sum over the params tree of stored times what comes back."""
    mesh = jaxpipe.make_mesh(pipe=len(cuts) - 1, data=data)
    layout = Layout(MODULE, cuts, LAYERS, mesh.shape, zero)
    weights, stored = Weights(layout, mesh), layout.from_layers(mesh, LAYERS)
    devices = mesh.size
    every = P(("pipe", "data"))
    zeros = jax.tree.map(lambda a: np.zeros((devices, *a.shape), a.dtype), weights.avals())
    gradients = jax.tree.map(lambda a: floats(*a.shape) if a.dtype == np.float32 else a, zeros)

    def both(stored, gradients, rank):
        mine = jax.tree.map(lambda a: a[0], gradients)
        return jax.tree.map(lambda a: a[None], weights.enter(stored, rank[0])), weights.leave(mine, rank[0])

    run = jax.shard_map(
        both, mesh=mesh, in_specs=(layout.specs, every, P("pipe")), out_specs=(every, layout.specs), check_vma=False
    )
    held, back = jax.device_get(jax.jit(run)(stored, gradients, jnp.arange(len(cuts) - 1)))
    assert jax.tree.map(np.shape, held) == jax.tree.map(np.shape, gradients)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), back) == jax.tree.map(lambda a: (a.shape, a.dtype), stored)

    def product(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(float((x.astype(np.float64) * y).sum()) for x, y in pairs if x.dtype == np.float32)

    wanted = product(held, gradients)
    assert abs(wanted - product(jax.device_get(stored), back)) < 1e-4 and abs(wanted) > 1e-3
    # More than the product: each gradient is the sum over the devices of the rank that owns it.
    if "owned" not in held:
        shared, shapes = gradients["shared"]["0_Odd"], layout.shapes()["shared"]["0_Odd"]
        sums = jax.tree.map(lambda a, kept: fit(a.sum(0, dtype=a.dtype), kept.shape), shared, shapes)
        assert_close(back["shared"]["0_Odd"], sums, 2e-6)
        return
    own = gradients["owned"]["vector: float32"][:data].sum(0)
    assert_close(back["shared"]["0_Odd"]["cut"][:6], own[:24].reshape(6, 4), 2e-6)
    assert_close(back["shared"]["0_Odd"]["whole"][:3], own[24:], 2e-6)
    first, *others = held["owned"]["vector: float32"].reshape(-1, data, 27)
    assert_close(first[0], np.concatenate([LAYERS[0]["cut"].ravel(), LAYERS[0]["whole"]]), 0)
    assert not np.any(others), "the other ranks hold nothing of it"


def test_where_nothing_counts_gradients_are_zeros_whatever_they_were():
    layout, mesh = Layout(MODULE, (0, 5), LAYERS), jaxpipe.make_mesh()
    weights = Weights(layout, mesh)
    sums = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan if a.dtype == jnp.float32 else 0, a.dtype), weights.avals())
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(weights.leave(sums, RANK, jnp.bool_(False))))
    assert np.isnan(weights.leave(sums, RANK, jnp.bool_(True))["stacked"]["Block"]["w"]).all()


def test_parts_take_and_add_by_address():
    layout, mesh = Layout(MODULE, (0, 5), LAYERS), jaxpipe.make_mesh()
    weights = Weights(layout, mesh)
    held = weights.enter(layout.from_layers(mesh, LAYERS), RANK)
    parts = [
        Part(KIND, 0, address=layout.address_of(0)),
        Part(KIND, 1, 2, layout.address_of(1), slot=0),
        Part(KIND, 3),
        Part(KIND, 4, 1, layout.address_of(4), slot=2),
    ]
    taken = weights.take(held, parts, 0)
    wanted = [LAYERS[0], jax.tree.map(lambda *a: np.stack(a), *LAYERS[1:3]), {}, LAYERS[4]]
    assert_close(taken, wanted, 0)
    sums = weights.blank_gradients(held)
    before = jax.tree.map(np.asarray, sums)
    # In the order of the inexact leaves: cut, whole, two layers at once, one layer.
    gradients = [jnp.asarray(a) for a in (floats(6, 4), floats(3), floats(2, 2, 2), floats(2, 2))]
    for _ in range(2):
        sums_now = weights.add(sums, parts, 0, taken, gradients)
        assert_close(sums, before, 0, "the sums that were passed stay as they are")
        sums = sums_now
        before = jax.tree.map(np.asarray, sums)
    stack = np.concatenate([gradients[2], gradients[3][None]])
    assert_close(sums["shared"]["0_Odd"]["cut"], 2 * gradients[0], 1e-6)
    assert_close(sums["shared"]["0_Odd"]["whole"], 2 * gradients[1], 1e-6)
    assert_close(sums["stacked"]["Block"]["w"], 2 * stack, 1e-6)
    assert (sums["stacked"]["Block"]["n"] == 0).all() and (sums["shared"]["0_Odd"]["ids"] == 0).all()


@pytest.mark.parametrize("stages", [1, 2])
def test_params_are_cast_as_they_enter_and_gradients_divided_as_they_leave(stages):
    cuts, mesh = ((0, 5), (0, 3, 5))[stages - 1], jaxpipe.make_mesh(pipe=stages)
    layout = Layout(MODULE, cuts, LAYERS, precision=Precision("bfloat16", "whole|layer_002"))
    # The rule takes layer 2 out of the stack.
    [stack] = layout.stacks.values()
    assert list(stack.places) == [1, 4] and [s.layer for s in layout.shared.values()] == [0, 2]
    assert {str(a.dtype) for a in jax.tree.leaves(layout.shapes())} == {"float32", "int32"}, "stored as before"
    weights, stored = Weights(layout, mesh), layout.from_layers(mesh, LAYERS)

    def both(stored, rank):
        held = weights.enter(stored, rank[0])
        sums = jax.tree.map(lambda s: s + 3 if s.dtype == jnp.float32 else s, weights.blank_gradients(held))
        left = weights.leave(sums, rank[0], scale=jnp.float32(2.0**20))
        return jax.tree.map(lambda a: a[None], held), left

    run = jax.shard_map(
        both,
        mesh=mesh,
        in_specs=(layout.specs, P("pipe")),
        out_specs=(P("pipe"), layout.specs),
        check_vma=False,
    )
    held, left = jax.jit(run)(stored, jnp.arange(stages))
    dtypes = jax.tree.map(lambda a: str(a.dtype), held)
    name = next(iter(layout.stacks))
    odd = {"cut": "bfloat16", "whole": "float32", "ids": "int32"}
    one = {"shared": {"0_Odd": odd, "2_Block": {"n": "int32", "w": "float32"}}}
    vectors = {"shared": {}, "owned": {f"vector: {dtype}": dtype for dtype in ("bfloat16", "float32", "int32")}}
    assert dtypes == {"stacked": {name: {"n": "int32", "w": "bfloat16"}}} | (one if stages == 1 else vectors)
    assert jax.tree.map(lambda a: str(a.dtype), weights.avals()) == dtypes
    cut = held["shared"]["0_Odd"]["cut"][0] if stages == 1 else held["owned"]["vector: bfloat16"][0].reshape(6, 4)
    assert_close(cut, jnp.asarray(LAYERS[0]["cut"], jnp.bfloat16), 0)
    assert left["shared"]["0_Odd"]["cut"].dtype == jnp.float32
    # 3 from the rank that uses it, whatever lies there on other ranks; 3 / 2^20 is no float16.
    for found in (left["shared"]["0_Odd"]["cut"], left["shared"]["0_Odd"]["whole"], left["stacked"][name]["w"]):
        assert (found == 3 / 2**20).all()


def test_short_floats_are_summed_in_long_ones_and_come_back_short():
    layers = [
        {"b": jnp.ones(2, jnp.bfloat16)},
        {"w": jnp.ones(2, jnp.float16)},
        {"w": jnp.ones(2, jnp.float16)},
        {},
        {},
    ]
    layout, mesh = Layout(MODULE, (0, 5), layers), jaxpipe.make_mesh()
    weights = Weights(layout, mesh)
    sums = weights.blank_gradients(weights.avals())
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}
    assert_close(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), layout.shapes()), weights.leave(sums, RANK), 0)
