"""Whatever an optimizer keeps, a checkpoint holds it, bit for bit, for any number of stages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpipe.model.values import raw
from tests.checkpoint.on_disk import arrays_of, assert_identical
from tests.optimizer.engines import data, engine_for
from tests.optimizer.optimizers import OPTIMIZERS, by_ndim, error


def history(size):
    """Keeps the last gradients of each param, as quasi-Newton methods do: a dim in front of those of the param."""

    def init(params):
        return {"past": jax.tree.map(lambda a: jnp.zeros((size, *a.shape), a.dtype), params)}

    def update(grads, state, params=None):
        past = jax.tree.map(lambda kept, g: jnp.roll(kept, 1, 0).at[0].set(g), state["past"], grads)
        return jax.tree.map(lambda kept: -0.1 * kept.mean(0), past), {"past": past}

    return optax.GradientTransformation(init, update)


# Nothing, masks, groups, factored moments, values that do not start at zero, keys, schedules, a dim in front, no names.
KEPT = {
    name: OPTIMIZERS[name]
    for name in ("adafactor", "by_path", "multi_steps", "hyperparams", "lookahead", "sm3", "nameless")
}


KEPT |= {
    "nothing": optax.sgd(0.1),
    "history": history(2),
    "filled": optax.adagrad(1e-2, initial_accumulator_value=0.1),
    "masked": optax.chain(optax.clip(1.0), optax.masked(optax.trace(0.9), by_ndim), optax.sgd(0.1)),
    "noisy": optax.chain(optax.add_noise(0.01, 0.5, 1), optax.adam(optax.cosine_decay_schedule(1e-2, 9))),
}


@pytest.mark.parametrize("name", KEPT)
def test_state_loads_at_another_number_of_stages(name, tmp_path):
    """Two steps at S = 2, a checkpoint, a step at S = 3: as three steps at S = 2. The state comes back bit by bit."""
    writer, items = engine_for(KEPT[name], 2), data(3)
    for _ in range(2):
        writer.train_batch(items)
    folder = writer.save_checkpoint(tmp_path, "a")
    reader = engine_for(KEPT[name], 3)
    reader.load_checkpoint(tmp_path)
    reader.save_checkpoint(tmp_path, "b")
    assert_identical(arrays_of(tmp_path / "b"), arrays_of(tmp_path / "a"), name)
    states = [e.optimizer.natural_state(e.state.opt_state) for e in (writer, reader)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for one, two in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(raw(one), raw(two))
    writer.train_batch(items)
    reader.train_batch(data(1, first=2))
    assert error(jax.device_get(reader.to_layers()), jax.device_get(writer.to_layers())) <= 1e-6
    stored = {item.name for item in (tmp_path / folder).iterdir()}
    assert {f"layer_{i:03d}" for i in range(7)} <= stored


def test_state_is_kept_with_its_layer():
    """Per layer what belongs to a layer, named as in the state of optax; once what does not."""
    engine = engine_for(OPTIMIZERS["by_path"], 2)
    found = engine._homes().expected(engine.state)
    in_layer = {index: {n for n in found[f"layer_{index:03d}"] if "mu" in n or "trace" in n} for index in range(7)}
    assert not in_layer[0] and not in_layer[2]  # frozen: no moments
    assert any("fast" in name and name.endswith("mu/w") for name in in_layer[1])
    assert in_layer[1] == in_layer[3] == in_layer[4] == in_layer[5]
    assert all("mu" not in name and "nu" not in name for name in found["state"])
    assert sum("count" in name for name in found["state"]) >= 1
