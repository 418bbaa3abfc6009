"""A grouped trace, run on the ranks, against the same function on the natural arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.optimizer.groups import Grouped
from jaxpipe.optimizer.run import run
from jaxpipe.optimizer.trace import Trace
from tests.optimizer.layouts import layout, mesh

LAYOUT = layout()
(STACK,) = LAYOUT.stacks.values()
LAYERS = tuple(STACK.places)
VALUES = np.random.default_rng(0).normal(size=(len(LAYERS), 3)).astype(np.float32)


def on_stacks(function, rate):
    """`function(arrays of the layers, rate) -> (arrays of the layers, number)` on the stack."""
    stack = np.full((2, STACK.slots, 3), np.nan, np.float32)  # padding must not get in
    for layer, value in zip(LAYERS, VALUES, strict=True):
        stack[STACK.places[layer]] = value
    closed = jax.make_jaxpr(function)(list(VALUES), rate)
    homes = [(STACK.name, layer) for layer in LAYERS]
    trace = Trace(closed, [*homes, None], ["in"] * len(homes) + [None], [*homes, None])
    inputs = [None] * len(homes) + [rate]
    targets = [(STACK.name, layer, "out") for layer in LAYERS] + [None]

    @jax.jit
    def ran(stack):
        return run(Grouped(trace), LAYOUT, mesh(), inputs, {"in": stack}, targets)

    made, (number,) = ran(stack)
    assert list(made) == [(STACK.name, "out")]
    return np.asarray(made[STACK.name, "out"]), number


def separately(arrays, rate):
    return [a * rate - jnp.sin(a) for a in arrays], rate + 1


def with_a_norm(arrays, rate):
    norm = jnp.sqrt(sum(jnp.sum(a * a) for a in arrays))
    return [a / norm for a in arrays], norm


def twice_joined(arrays, rate):
    arrays, norm = with_a_norm(arrays, rate)
    return with_a_norm([a + norm for a in arrays], rate)


def whole_arrays_meet(arrays, rate):
    mean = sum(arrays) / len(arrays)
    return [a - mean for a in arrays], mean.sum()


def one_is_different(arrays, rate):
    return [jnp.cos(arrays[0]), *[a * rate for a in arrays[1:-1]], arrays[-1]], rate


@pytest.mark.parametrize(
    "function", [separately, with_a_norm, twice_joined, whole_arrays_meet, one_is_different], ids=lambda f: f.__name__
)
def test_as_on_the_natural_arrays(function):
    rate = jnp.float32(0.5)
    found, number = on_stacks(function, rate)
    wanted, wanted_number = function(list(VALUES), rate)
    for layer, value in zip(LAYERS, wanted, strict=True):
        np.testing.assert_allclose(found[STACK.places[layer]], value, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(number, wanted_number, rtol=1e-6)
    padding = np.ones((2, STACK.slots), bool)
    for place in STACK.places.values():
        padding[place] = False
    assert (found[padding] == 0).all()
