"""Homes of values, and what is merged and dropped."""

import jax
import jax.extend.core
import jax.numpy as jnp

from tests.optimizer.traces import A, B, X, traced


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
