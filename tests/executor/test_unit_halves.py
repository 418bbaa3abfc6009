"""The backward of real blocks in two ops: what each costs, and how much waits between them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpipe.executor.unit_halves import UnitHalves
from jaxpipe.executor.unit_kinds import Keep, Recompute
from jaxpipe.layout.layout import Address
from jaxpipe.layout.stages import Part, StatePlace
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.layers import Kind
from jaxpipe.model.shapes import avals
from tests.compare import assert_close

WIDTH, HEADS, LENGTH, ROWS = 64, 4, 16, 2


def normalized(x, scale, dims=(-1,)):
    x = x - x.mean(dims, keepdims=True)
    return x * lax.rsqrt((x**2).mean(dims, keepdims=True) + 1e-5) * scale


def gpt_block(p, x):
    h = normalized(x, p["n1"]) @ p["qkv"]
    q, k, v = jnp.moveaxis(h.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    chances = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    x = x + jnp.einsum("bhts,bshd->bthd", chances, v).reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(normalized(x, p["n2"]) @ p["up"]) @ p["down"]


def gpt_params(key):
    shapes = {"qkv": 3 * WIDTH, "out": WIDTH, "up": 4 * WIDTH}
    weights = {name: jax.random.normal(key, (WIDTH, width)) / 8 for name, width in shapes.items()}
    return {**weights, "down": weights["up"].T, "n1": jnp.ones((1, 1, WIDTH)), "n2": jnp.ones((1, 1, WIDTH))}


def scanned(p, x):
    return lax.scan(lambda x, p: (gpt_block(p, x), None), x, p)[0]


def scanned_again(p, x):
    return lax.scan(lambda x, p: (jax.checkpoint(gpt_block)(p, x), None), x, p)[0]


def conv_block(p, x):
    for number in (1, 2):
        layout = ("NHWC", "HWIO", "NHWC")
        h = lax.conv_general_dilated(x, p[f"w{number}"], (1, 1), "SAME", dimension_numbers=layout)
        x = x + jax.nn.relu(normalized(h, p[f"n{number}"], (0, 1, 2)))
    return x


def conv_params(key):
    return {
        name: jax.random.normal(key, (3, 3, 16, 16)) / 12 if name[0] == "w" else jnp.ones((1, 1, 1, 16))
        for name in ("w1", "w2", "n1", "n2")
    }


def stack(params):
    return jax.tree.map(lambda a: jnp.stack([a, 1.1 * a, 0.9 * a]), params)


KEY = jax.random.key(0)
TOKENS, IMAGES = (ROWS, LENGTH, WIDTH), (4, 8, 8, 16)
# layer, params, shape of the input, and how many inputs of a block may cross
BLOCKS = {
    "gpt": (gpt_block, gpt_params(KEY), TOKENS, 16),
    "convolutions": (conv_block, conv_params(KEY), IMAGES, 4),
    "scanned": (scanned, stack(gpt_params(KEY)), TOKENS, 3 * 16),
    "scanned, run again": (scanned_again, stack(gpt_params(KEY)), TOKENS, 3 * 16),
}
dots = functools.partial(Keep, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


@pytest.mark.parametrize("make", [Recompute, Keep, dots], ids=["recompute", "keep", "dots"])
@pytest.mark.parametrize("name", BLOCKS)
def test_two_halves_cost_what_one_whole_does(name, make):
    """At most 1.02 times the FLOPs, by XLA's own count. Nothing of what the forward computes is computed by both."""
    layer, params, shape, most = BLOCKS[name]
    part = Part(Kind(lambda key, x: {}, layer), 0, run=lambda p, x, context: (layer(p, x), Aux()))
    unit = make([part], *avals(([params], jax.ShapeDtypeStruct(shape, jnp.float32), [Context()])))
    halves = UnitHalves(unit, inputs_again=False)
    known, saved = unit.saved[: len(unit.saved_inputs)], unit.saved[len(unit.saved_inputs) :]
    both = unit.params, unit.params

    def whole(params, known, saved, dy):
        return unit.backward(*params, known, saved, [Context()], dy)

    def first(params, known, saved, dy):
        return halves.first(*params, known, saved, [Context()], dy, None)

    def second(params, waits):
        return halves.second(*params, [], [Context()], None, waits)

    in_one = flops(whole, both, known, saved, unit.wanted)
    in_two = flops(first, both, known, saved, unit.wanted), flops(second, both, halves.pending)
    assert sum(in_two) <= 1.02 * in_one
    assert min(in_two) > 0.2 * in_one, "the halves are of one size, more or less"
    pending = sum(math.prod(a.shape) for a in halves.pending) / math.prod(shape)
    assert pending <= most + 2 * (make is dots) * most / 16


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("make", [Recompute, Keep], ids=["recompute", "keep"])
@pytest.mark.parametrize("inputs_again", [True, False])
def test_gradients_with_noise_integers_and_state_that_has_gone_on(make, inputs_again):
    """W is given other state than I was, and NaN for an input that it is not to look at."""

    def run(params, x, context):
        scale = context.state["scale"] * params["n"].astype(jnp.float32)
        h = jnp.tanh(x["h"] @ params["w"] * scale + params["b"]) * jax.random.uniform(context.key, x["h"].shape)
        return {"h": h, "n": x["n"]}, Aux({"scale": context.state["scale"] + 1})

    place = StatePlace(Address("shared", "0"), 0, (True,))
    part = Part(Kind(lambda key, x: {}, run), 0, state=place, run=run)
    rng = np.random.default_rng(0)
    w, b, h, dy, scale = (jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for _ in range(5))
    params, x = [{"w": w, "b": b, "n": jnp.int32(2)}], {"h": h, "n": jnp.arange(3)}
    contexts = [Context(jax.random.key(1, impl="rbg"), {"scale": scale})]
    unit = make([part], *avals((params, x, contexts)))
    halves = UnitHalves(unit, inputs_again)

    @jax.jit
    def both(params, x, contexts, dy):
        _, _, kept = unit.forward(params, x, contexts)
        known, saved = kept[: len(unit.saved_inputs)], kept[len(unit.saved_inputs) :]
        later = [context._replace(state=jax.tree.map(lambda a: a + jnp.nan, context.state)) for context in contexts]
        dx, early, waits = halves.first(params, params, known, saved, later, [dy], None)
        late = halves.second(params, params, known if inputs_again else [], later, None, waits)
        assert [(a.shape, a.dtype) for a in waits] == [(a.shape, a.dtype) for a in halves.pending]
        return dx, [a if b is None else b for a, b in zip(early, late, strict=True)]

    (dx,), gradients = both(params, x, contexts, dy)
    _, pullback = jax.vjp(
        lambda b, w, h: run({"w": w, "b": b, "n": params[0]["n"]}, {**x, "h": h}, contexts[0])[0]["h"], b, w, h
    )
    wanted = pullback(dy)
    assert_close((*gradients, dx), wanted, 2e-6)
