"""The whole training step as the compiler sees it: of an engine, and from shapes alone."""

import jax
import optax
import pytest

import jaxpipe
from jaxpipe.errors import DataError
from tests.engines import M, batches, engine_for
from tests.models import untied


def test_the_step_of_an_engine_and_of_shapes_are_one():
    """From arrays and from shapes it is the same text; without an engine it takes as much; and `train_batch` runs it."""
    engine = engine_for(untied(), 2, 2)
    (batch,) = batches(1)
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    lowered = engine.lower_train(batch)
    assert lowered.as_text() == engine.lower_train(avals).as_text()
    report = jaxpipe.compile(
        untied(),
        optax.adamw(1e-2),
        mesh=jaxpipe.make_mesh(pipe=2, data=2),
        example=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), avals),
        config={"num_micro_batches": M},
    )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert report.bytes_per_device["total"] == used + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    # It runs, on what the engine has.
    inputs, labels = jax.device_put(batch, jax.tree.leaves(compiled.input_shardings[0][1])[0])
    state, info = compiled(engine.state, inputs, labels)
    assert info.finite and int(state.step) == 1
    other = engine_for(untied(), 2, 2)
    assert float(other.train_batch(iter(zip(*batch, strict=True)))) == pytest.approx(float(info.loss), rel=1e-6)


def test_a_batch_of_another_m_is_refused():
    engine = engine_for(untied(), 2, 1)
    (batch,) = batches(1)
    with pytest.raises(DataError, match="there are 3 micro-batches"):
        engine.lower_train(jax.tree.map(lambda a: a[:2], batch))
