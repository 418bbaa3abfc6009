"""The parts of the optimizer machinery on small traces, without devices."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.optimizer.calls import masked_while, taken_apart
from jaxpipe.optimizer.fingerprint import fingerprint
from jaxpipe.optimizer.groups import Grouped
from jaxpipe.optimizer.trace import Trace

A, B, C = ("Block", 0), ("Block", 1), ("Block", 2)
X = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def traced(function, homes, out_homes, avals=None):
    avals = avals or [X] * len(homes)
    closed = jax.make_jaxpr(function)(*avals)
    return Trace(closed, homes, [("in", "w") if home else None for home in homes], out_homes)


# ------------------------------------------------------------------------------------------------------------ fingerprint


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ((1, 2), [1, 2]),
        (np.float32(1), np.float64(1)),
        (np.arange(3), np.arange(3)[::-1]),
        ({"a": 1}, {"a": 2}),
    ],
)
def test_fingerprints_of_unlike_things(one, two):
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(one)


def test_fingerprints_of_jaxprs_look_at_structure_and_literals():
    def jaxpr(factor):
        return jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y * factor, x))(1.0)

    assert fingerprint(jaxpr(2.0)) == fingerprint(jaxpr(2.0))
    assert fingerprint(jaxpr(2.0)) != fingerprint(jaxpr(3.0))
    assert fingerprint(float("nan")) == fingerprint(float("nan"))


# ------------------------------------------------------------------------------------------------------------------ homes


def test_what_one_layer_computes_stays_there_and_scalars_of_all_join():
    def norm_scaled(a, b):
        norm = jnp.sqrt(jnp.sum(a * a) + jnp.sum(b * b))
        return a / norm, b / norm

    trace = traced(norm_scaled, [A, B], [A, B])
    homes = [(eqn.primitive.name, eqn.home) for eqn in trace.equations]
    assert homes.count(("reduce_sum", A)) == 1 and homes.count(("reduce_sum", B)) == 1
    assert ("add", None) in homes and ("sqrt", None) in homes
    assert [v.home for v in trace.outputs] == [A, B]
    grouped = Grouped(trace)
    assert sorted(grouped.groups) == [0, 1]  # the sums, then the divisions
    assert all(len(group) == 2 for groups in grouped.groups.values() for group in groups)
    assert len(grouped.gathered) == 1


def test_arrays_of_several_layers_have_no_home():
    trace = traced(lambda a, b: (a - (a + b) / 2, b), [A, B], [A, B])
    joins = [eqn for eqn in trace.equations if eqn.primitive.name == "add"]
    assert [eqn.home for eqn in joins] == [None] and joins[0].outputs[0].joined


def test_noise_belongs_to_the_only_layer_that_reads_it():
    def noisy(a, b, key):
        one, two = jax.random.split(key)
        return a + jax.random.normal(one, (30, 4)), b + jax.random.normal(two, (30, 4))

    wide = jax.ShapeDtypeStruct((30, 4), jnp.float32)
    trace = traced(noisy, [A, B, None], [A, B], [wide, wide, jax.eval_shape(lambda: jax.random.key(0))])
    drawn = [eqn.home for eqn in trace.equations if eqn.primitive.name == "random_bits"]
    assert drawn == [A, B]


def test_unused_equations_are_dropped_and_equal_ones_merged():
    def update(a, b, count):
        unused = jnp.sin(a)  # noqa: F841
        return a * (1 - 0.9**count), b * (1 - 0.9**count)

    trace = traced(update, [A, B, None], [A, B], [X, X, jax.ShapeDtypeStruct((), jnp.float32)])
    names = [eqn.primitive.name for eqn in trace.equations]
    assert "sin" not in names and names.count("pow") == 1


def test_callbacks_run_once_and_have_no_home():
    def shown(a):
        jax.debug.callback(lambda x: None, a)
        return a * 2

    trace = traced(shown, [A], [A])
    [aside] = [eqn for eqn in trace.equations if eqn.aside]
    assert aside.home is None


def test_like_equations_of_like_layers_are_one_group_whatever_else_a_layer_does():
    def update(a, b, c):
        return jnp.tanh(a) * 0.1, jnp.tanh(b) * 0.2, jnp.exp(c)

    grouped = Grouped(traced(update, [A, B, C], [A, B, C]))
    sizes = {group[0].primitive.name: len(group) for group in grouped.groups[0]}
    assert sizes == {"tanh": 2, "mul": 2, "exp": 1}


# ------------------------------------------------------------------------------------------------------------------ calls


def find(function, name, *args):
    [eqn] = [eqn for eqn in jax.make_jaxpr(function)(*args).jaxpr.eqns if eqn.primitive.name == name]
    return eqn


@pytest.mark.parametrize("which", [-3, 0, 1, 2, 7])
def test_a_conditional_taken_apart_gives_the_same(which):
    def choose(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: 2 * x, lambda x: x * x], x)

    closed = jax.make_jaxpr(choose)(jnp.int32(0), jnp.ones(3))
    eqn = next(e for e in closed.jaxpr.eqns if e.primitive.name == "cond")
    inner = taken_apart(eqn, joins=True)
    assert taken_apart(eqn, joins=False) is None
    x = jnp.arange(3.0)
    index = jnp.clip(which, 0, 2)
    found = jax.extend.core.jaxpr_as_fun(inner)(index, x)
    np.testing.assert_array_equal(found[0], choose(which, x))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_short_scan_taken_apart_gives_the_same(reverse):
    def summed(x, ys):
        return jax.lax.scan(lambda c, y: (c * 0.5 + y, c), x, ys, reverse=reverse)

    x, ys = jnp.float32(3), jnp.arange(5.0)
    inner = taken_apart(find(summed, "scan", x, ys), joins=True)
    found = jax.extend.core.jaxpr_as_fun(inner)(x, ys)
    for a, b in zip(found, summed(x, ys), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_long_scan_stays_whole():
    eqn = find(lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, length=100)[0], "scan", jnp.ones(3))
    assert taken_apart(eqn, joins=True) is None


def test_a_loop_that_is_not_wanted_does_nothing():
    eqn = find(lambda x: jax.lax.while_loop(lambda c: c < 10, lambda c: c + 1, x), "while", jnp.int32(0))
    assert masked_while(eqn.params, True, jnp.int32(0)) == [10]
    assert masked_while(eqn.params, False, jnp.int32(0)) == [0]
