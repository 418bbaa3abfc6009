"""Which state a backward reads."""

import jax
import jax.numpy as jnp

from jaxpipe.executor import passing
from jaxpipe.layout.layout import Address
from jaxpipe.layout.stages import Part, StatePlace
from jaxpipe.model.context import Context
from jaxpipe.model.kinds import Kind

KIND = Kind(lambda key, x: {}, lambda params, x, context, train: x)
PLACE = StatePlace(Address("shared", "0"), 0, (True, False, True))
PARTS = [Part(KIND, 0, state=PLACE), Part(KIND, 1), Part(KIND, 2, state=PLACE._replace(changes=(True,)))]


def test_leaves_that_go_on_are_counted_behind_the_keys():
    state = {"a": jnp.float32(1), "b": jnp.float32(2), "c": jnp.float32(3)}
    contexts = [Context(jax.random.key(0), state), Context(jax.random.key(1)), Context(None, {"d": jnp.float32(4)})]
    assert passing.numbers(PARTS, contexts) == [1, 3, 5]
    after = passing.replaced(contexts, [3, 5], [jnp.float32(30), jnp.float32(40)])
    assert [after[0].state[name] for name in "abc"] == [1, 2, 30] and after[2].state["d"] == 40
    assert contexts[0].state["c"] == 3


def test_what_is_only_written_is_not_read():
    def backward(x, contexts):
        state = contexts[0].state
        written = jax.jit(lambda mean: 0.9 * mean + x)(state["mean"])
        return (x * state["scale"], x), jnp.zeros_like(written) + 1

    contexts = [Context(None, {"mean": jnp.float32(0), "scale": jnp.float32(2)})]
    trace = jax.make_jaxpr(backward)(jnp.float32(1), contexts)
    assert passing.read(trace, 1, [0, 1]) == [1]
