"""Units against `jax.vjp`: outputs, gradients, and what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.executor.unit import Keep, Recompute, repeated, run_parts, split_inexact
from jaxpipe.model.layers import Kind
from jaxpipe.model.shapes import aval, avals, is_inexact
from jaxpipe.model.stages import Part
from tests.compare import assert_close

POLICIES = jax.checkpoint_policies
MAKE = {
    "recompute": Recompute,
    "keep": Keep,
    "dots": functools.partial(Keep, policy=POLICIES.dots_saveable),
    "nothing": functools.partial(Keep, policy=POLICIES.nothing_saveable),
    "everything": functools.partial(Keep, policy=POLICIES.everything_saveable),
}
ways = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
TABLE = np.asarray([0.5, -1.0, 2.0], np.float32)
rng = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def part(run, offset=0, count=1):
    return Part(Kind(lambda key, x: {}, run), offset, count, run=run)


def numbers(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def check(make, parts, params, x, keys):
    """Runs a unit forward and backward, with nothing but what it says it keeps, and compares with `jax.vjp`."""
    unit = make(parts, *avals((params, x, keys)))
    leaves = jax.tree.leaves(x)
    count = len(unit.saved_inputs)
    assert unit.saved[:count] == [aval(leaves[i]) for i in unit.saved_inputs]
    param_leaves, with_params = split_inexact(params)
    x_leaves, with_x = split_inexact(x)
    dy = [floats(*leaf.shape) for leaf in split_inexact(unit.outputs)[0]]

    def plain(param_leaves, x_leaves):
        out = run_parts(parts, with_params(param_leaves), with_x(x_leaves), keys)  # integers and keys as they are
        return split_inexact(out)[0], out

    @jax.jit  # all in one: compiling is what takes the time here
    def both(params, x, keys, dy):
        y, saved = unit.forward(params, x, keys)
        assert [(a.shape, a.dtype) for a in saved] == [(a.shape, a.dtype) for a in unit.saved]
        found = unit.backward(params, saved[:count], saved[count:], keys, dy)
        _, pullback, out = jax.vjp(plain, split_inexact(params)[0], split_inexact(x)[0], has_aux=True)
        return (y, found), (out, pullback(dy))

    (y, found), (wanted, gradients) = both(params, x, keys, dy)
    assert len(param_leaves) == len(found[0]) and len(x_leaves) == len(found[1])
    assert_close(jax.tree.map(numbers, y), jax.tree.map(numbers, wanted), 1e-6, "output")
    assert_close(found, gradients, 2e-6, "gradient")
    return unit


def everything(params, x, key):
    """Integers and keys on all sides, a constant, results that are arguments, and one that the input does not enter."""
    h = jnp.tanh(x["h"] @ params["w"]) * params["scale"].astype(jnp.float32)
    h = h + jax.random.normal(key, h.shape) + jax.random.uniform(x["key"], h.shape) + jnp.broadcast_to(TABLE, h.shape)
    return {
        "h": h * x["ids"][:, None].astype(jnp.float32),
        "constant": jnp.full((2,), 3.0),
        "ids": x["ids"] + params["scale"],
        "params only": jnp.sin(params["w"]),
        "same": x["h"],
        "twice": (h, h),
        "key": jax.random.fold_in(x["key"], 1),
        "none": x["none"],
    }


@ways
def test_gradients_of_everything_that_a_layer_may_do(make):
    params = [{"w": floats(3, 3), "scale": jnp.int32(2)}]
    x = {"h": floats(4, 3), "ids": jnp.arange(4), "key": jax.random.key(1, impl="rbg"), "none": None}
    check(make, [part(everything)], params, x, [jax.random.key(2, impl="rbg")])


@pytest.mark.parametrize("make", [Recompute, Keep, MAKE["dots"]], ids=["recompute", "keep", "dots"])
def test_several_parts_with_a_scan_among_them(make):
    def dense(params, x, key):
        return jnp.tanh(x @ params["w"]) + 0.1 * jax.random.normal(key, x.shape)

    parts = [part(lambda p, x, k: jnp.sin(x)), part(dense, 1, 3), part(lambda p, x, k: x), part(dense, 5)]
    params = [{}, {"w": floats(3, 3, 3)}, {}, {"w": floats(3, 3)}]
    keys = [None, jax.random.split(jax.random.key(0, impl="rbg"), 3), None, jax.random.key(9, impl="rbg")]
    check(make, parts, params, floats(4, 3), keys)


@pytest.mark.parametrize("make", [Recompute, Keep], ids=["recompute", "keep"])
@pytest.mark.parametrize("constant", [True, False])
def test_outputs_that_are_constant_or_the_input(make, constant):
    unit = check(make, [part(lambda p, x, k: jnp.ones(2) if constant else x)], [{}], floats(2), [None])
    if make is Keep:
        assert unit.saved == [], "no derivative needs anything"


@pytest.mark.parametrize(
    ("run", "inputs", "computed"),
    [
        (lambda p, x, k: x["h"] @ p["w"], ["h"], []),
        (lambda p, x, k: x["h"] + p["w"], [], []),
        (lambda p, x, k: jnp.where(x["on"], x["h"], p["w"]), ["on"], []),
        (lambda p, x, k: x["h"] * jax.random.bernoulli(k, 0.5, (3, 3)).astype(jnp.float32), [], None),
        (lambda p, x, k: jnp.exp(x["h"]) @ p["w"], [], [(3, 3)]),
    ],
    ids=["matmul", "sum", "select", "dropout", "exp"],
)
def test_params_keys_and_inputs_that_are_known_are_not_kept(run, inputs, computed):
    """What is kept of the input is what the backward needs of it; params and keys are there at the backward anyway."""
    x = {"h": floats(3, 3), "on": jnp.eye(3) > 0}
    unit = check(Keep, [part(run)], [{"w": floats(3, 3)}], x, [jax.random.key(0, impl="rbg")])
    assert [("h", "on")[i] for i in unit.saved_inputs] == inputs
    if computed is not None:
        assert [leaf.shape for leaf in unit.saved[len(inputs) :]] == computed
    assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in unit.saved)


def test_leaves_with_derivatives_go_back_where_they_were():
    tree = {"a": jnp.ones(2), "n": jnp.arange(2), "c": jnp.ones(1, jnp.complex64), "none": None, "k": jax.random.key(0)}
    leaves, rebuild = split_inexact(tree)
    assert [leaf.dtype for leaf in leaves] == [jnp.float32, jnp.complex64] and all(map(is_inexact, leaves))
    back = rebuild(["first", "second"])
    assert (back["a"], back["c"]) == ("first", "second") and back["n"] is tree["n"] and back["none"] is None
    with pytest.raises(ValueError, match="shorter"):
        rebuild(["first"])


def test_repetitions_in_order_and_a_single_one_without_a_scan():
    assert repeated(lambda c, i: (c, i), "carry", 1) == ("carry", 0)
    assert int(repeated(lambda c, i: c * 10 + i, jnp.int32(7), 4)) == 70123
