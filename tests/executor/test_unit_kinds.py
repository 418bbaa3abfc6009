"""Units against `jax.vjp`: outputs, gradients, and what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.executor.unit import run_parts, split_inexact
from jaxpipe.executor.unit_kinds import Keep, Recompute
from jaxpipe.layout.layout import Address
from jaxpipe.layout.stages import Part, StatePlace
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.layers import Kind
from jaxpipe.model.shapes import aval, avals
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


def part(function, offset=0, count=1):
    def run(params, x, context):
        return function(params, x, context.key), Aux()

    return Part(Kind(lambda key, x: {}, run), offset, count, run=run)


def numbers(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def check(make, parts, params, x, keys):
    """Runs a unit forward and backward, with nothing but what it says it keeps, and compares with `jax.vjp`."""
    contexts = [Context(key) for key in keys]
    unit = make(parts, *avals((params, x, contexts)))
    leaves = jax.tree.leaves(x)
    count = len(unit.saved_inputs)
    assert unit.saved[:count] == [aval(leaves[i]) for i in unit.saved_inputs]
    param_leaves, with_params = split_inexact(params)
    x_leaves, with_x = split_inexact(x)
    dy = [floats(*leaf.shape) for leaf in split_inexact(unit.outputs)[0]]

    def plain(param_leaves, x_leaves):
        out, _ = run_parts(
            parts, with_params(param_leaves), with_x(x_leaves), contexts
        )  # integers and keys as they are
        return split_inexact(out)[0], out

    @jax.jit  # all in one: compiling is what takes the time here
    def both(params, x, contexts, dy):
        y, _, saved = unit.forward(params, x, contexts)
        assert [(a.shape, a.dtype) for a in saved] == [(a.shape, a.dtype) for a in unit.saved]
        found = unit.backward(params, params, saved[:count], saved[count:], contexts, dy)
        _, pullback, out = jax.vjp(plain, split_inexact(params)[0], split_inexact(x)[0], has_aux=True)
        return (y, found), (out, pullback(dy))

    (y, found), (wanted, gradients) = both(params, x, contexts, dy)
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


@pytest.mark.parametrize("make", [Recompute, Keep, MAKE["dots"]], ids=["recompute", "keep", "dots"])
def test_a_backward_sees_the_state_of_its_own_forward(make):
    """What is read of state that goes on is kept; what is only written, and what stays, is not."""

    def run(params, x, context):
        state = context.state
        y = jnp.tanh(x @ params["w"]) * state["read"] + jnp.broadcast_to(state["table"], x.shape)
        y = y * jnp.exp(x * jnp.broadcast_to(state["table"], x.shape))
        after = {"read": state["read"] + y, "table": state["table"], "written": 0.5 * state["written"] + y.sum()}
        return y, Aux(after)

    place = StatePlace(Address("shared", "0"), 0, (True, False, True))
    parts = [Part(Kind(lambda key, x: {}, run), 0, state=place, run=run)]
    params, x = [{"w": floats(3, 3)}], floats(4, 3)
    contexts = [Context(jax.random.key(0), {"read": floats(4, 3), "table": floats(3), "written": floats(5)})]
    unit = make(parts, *avals((params, x, contexts)))
    y, [aux], saved = unit.forward(params, x, contexts)
    count = len(unit.saved_inputs)
    assert {leaf.shape for leaf in unit.saved[count:]} == {(4, 3)}, "what is read, and not (5,), which is written only"
    assert make is not Recompute or len(unit.saved) == 2
    later = [contexts[0]._replace(state={**aux.state, "table": contexts[0].state["table"]})]
    assert (later[0].state["read"] != contexts[0].state["read"]).all()
    dy = floats(4, 3)
    found = unit.backward(params, params, saved[:count], saved[count:], later, [dy])
    _, pullback = jax.vjp(lambda w, x: run({"w": w}, x, contexts[0])[0], params[0]["w"], x)
    assert_close(tuple(found[0] + found[1]), pullback(dy), 2e-6)
    wanted = run(params[0], x, contexts[0])
    assert_close((y, aux), wanted, 1e-6)
