"""What the layers of a rank are given beside params and input."""

import jax
import jax.numpy as jnp

from jaxpipe.executor import beside
from jaxpipe.layout.stages import Part
from jaxpipe.model import keys
from jaxpipe.model.context import Aux
from jaxpipe.model.kinds import Kind
from jaxpipe.model.metrics import Joined, Max, Mean, joinable

DRAWS = Kind(lambda key, x: {}, lambda params, x, context, train: (x, Aux()), uses_key=True)


def test_keys_by_the_index_of_the_layer():
    root = jax.random.key(1)
    parts = [Part(DRAWS, 0), Part(DRAWS, 1, 2)]
    one, two = beside.contexts(parts, Aux(), root, jnp.int32(4), jnp.int32(3))
    assert one.key == keys.layer_key(root, 7), "stage starts at 4, and there were three layers of this part before"
    assert (two.key == jnp.stack([keys.layer_key(root, 11), keys.layer_key(root, 12)])).all()
    assert [context.key for context in beside.contexts(parts, Aux(), None, jnp.int32(4), 0)] == [None, None]


def given(**aux):
    """What a layer gives, as it is after the trace of the layer."""
    metrics = joinable(aux.get("metrics", {}), 2)
    return Aux(losses=aux.get("losses", {}), metrics=metrics)


def test_what_layers_give_is_joined_by_its_rule():
    one = given(losses={"a": jnp.float32(1)}, metrics={"mean": jnp.float32(4), "most": Max(jnp.float32(7))})
    many = given(
        losses={"a": jnp.asarray([2.0, 3.0]), "b": jnp.asarray([5.0, 6.0])}, metrics={"mean": jnp.asarray([1.0, 4.0])}
    )
    # The trace of a scan of two layers: each term has a leading dim.
    many = many._replace(metrics={"mean": Joined((many.metrics["mean"].terms[0], jnp.asarray([2.0, 2.0])), Mean)})
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((), a.dtype), (one, many))
    more = joinable({"own": jnp.float32(1)}, 1)
    found = beside.start(shapes, more)
    assert {name: float(loss) for name, loss in found.losses.items()} == {"a": 0, "b": 0}
    assert found.metrics["most"].terms == (-jnp.inf,)
    parts = [Part(DRAWS, 0), Part(DRAWS, 1, 2)]
    for _ in range(2):
        found = beside.joined(beside.record(found, parts, 0, [one, many]), more)
    assert {name: float(loss) for name, loss in found.losses.items()} == {"a": 12, "b": 22}
    assert {n: float(joined.finish()) for n, joined in found.metrics.items()} == {"mean": 3, "most": 7, "own": 1}


def test_what_nobody_wants_is_left_out():
    one = given(losses={"a": jnp.float32(1)}, metrics={"mean": jnp.float32(4)})
    assert beside.record(Aux(), [Part(DRAWS, 0)], 0, [one]) == Aux()
