"""A backward in two halves: the same results bit by bit, no product twice, and what crosses is little."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxpipe.executor.halves import Halves

from jaxpipe.executor.unit_kinds import Keep, Recompute
from jaxpipe.layout.stages import Part
from jaxpipe.model.capture import capture
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.layers import Kind
from jaxpipe.model.shapes import avals
from tests.executor.random_traces import N, one_by_one, products, random_trace


@pytest.mark.parametrize("seed", range(30))
def test_random_traces_bit_by_bit(seed):
    function, count, rng = random_trace(seed)
    whole = capture(function, *[jax.ShapeDtypeStruct((N, N), jnp.float32)] * count)
    results = len(whole.outputs)
    late = [number for number in range(results) if rng.random() < 0.6]
    again = [rng.random() < 0.4 for _ in range(count)]
    halves = Halves(whole, late, again)

    args = [jnp.asarray(a, jnp.float32) for a in np.random.default_rng(seed).normal(size=(count, N, N))]
    wanted = one_by_one(whole.jaxpr, args)
    found = iter(one_by_one(halves._first.jaxpr, args))
    got = {number: next(found) for number in range(results) if number not in late}
    got |= {number: next(found) for number, early in zip(late, halves.early, strict=True) if early}
    pending = list(found)
    assert [(a.shape, a.dtype) for a in pending] == [(a.shape, a.dtype) for a in halves.pending]
    known = [a for a, both in zip(args, again, strict=True) if both]
    found = iter(one_by_one(halves._second.jaxpr, [*known, *pending]))
    got |= {number: next(found) for number, early in zip(late, halves.early, strict=True) if not early}
    for number, leaf in enumerate(wanted):
        np.testing.assert_array_equal(got[number], leaf, f"result {number}")
    assert products(halves._first.jaxpr) + products(halves._second.jaxpr) <= products(whole.jaxpr)


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
    whole = unit._backward
    arguments = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in whole.jaxpr.jaxpr.invars]
    count = len(jax.tree.leaves(params))
    again = [number < count * (1 + (make is Recompute)) for number in range(len(arguments))]
    halves = Halves(whole, range(count), again)

    def first(args):
        results, early, pending = halves.first(args)
        return results, [a for a in early if a is not None], pending

    def second(args, pending):
        return [a for a in halves.second(args, pending) if a is not None]

    in_one = flops(lambda args: whole.leaves(*args), arguments)
    in_two = flops(first, arguments), flops(second, arguments, halves.pending)
    assert sum(in_two) <= 1.02 * in_one
    assert min(in_two) > 0.2 * in_one, "the halves are of one size, more or less"
    pending = sum(math.prod(a.shape) for a in halves.pending) / math.prod(shape)
    assert pending <= most + 2 * (make is dots) * most / 16


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
