"""What may be an optimizer, what it is given, where its state is, and what it costs."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, LayerError
from jaxpipe.model.values import raw
from tests.checkpoint.on_disk import arrays_of, assert_identical
from tests.models import MODELS, make_batch
from tests.optimizer.engines import M, data, engine_for
from tests.optimizer.optimizers import OPTIMIZERS, by_ndim, error, natural


def only_init():
    return type("OnlyInit", (), {"init": lambda self, params: params})()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (None, "optimizer=None is no optax gradient transformation. Pass one, such as optax.adam"),
        (1e-3, r"optimizer=0.001 .* It is a number.*optax.adam\(0.001\)"),
        (optax.adam, r"has to be called, as in optax.adam\(1e-3\)"),
        (optax.linear_schedule(1e-2, 1e-3, 5), "a learning rate schedule goes into one"),
        (optax.MultiSteps, "is no optax gradient transformation"),
        (only_init(), r"needs the functions init\(params\) and update"),
        ([optax.adam(1e-3)], "is no optax gradient transformation"),
        (optax.lbfgs(), "needs the argument 'value_fn', which a training step cannot give"),
        (optax.chain(optax.clip(1.0), optax.scale_by_backtracking_linesearch(5)), "needs the argument 'value_fn'"),
        (optax.contrib.sophia(1e-3), "needs the argument 'obj_fn'"),
        (optax.chain(optax.lookahead(optax.sgd(0.1), 2, 0.5)), "Put it outside: optax.lookahead"),
    ],
)
def test_what_is_refused(optimizer, message, monkeypatch):
    """Before any weight is made."""
    monkeypatch.setattr(jaxpipe.Pipeline, "init", lambda *_: pytest.fail("weights were made"))
    with pytest.raises(ConfigError, match=message):
        engine_for(optimizer, 2)


def test_errors_of_an_optimizer_are_its_own():
    def update(grads, state, params):
        raise IndexError("no such parameter group")

    with pytest.raises(IndexError, match="no such parameter group") as caught:
        engine_for(optax.GradientTransformation(lambda p: (), update), 2)
    assert any("inside the optimizer" in note for note in caught.value.__notes__)


def test_a_state_that_grows_is_refused():
    tx = optax.GradientTransformation(
        lambda p: jnp.zeros(1), lambda g, s, p=None: (g, jnp.concatenate([s, jnp.ones(1)]))
    )
    with pytest.raises(ConfigError, match=r"changes the shape of its state .* from float32\[1\] to float32\[2\]"):
        engine_for(tx, 2)
    tx = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g, {"new": jnp.zeros(())}))
    with pytest.raises(ConfigError, match="a state of another structure than its init"):
        engine_for(tx, 2)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda g, s, p=None: ({}, s), r"returns the updates \{\}, which do not fit the params"),
        (lambda g, s, p=None: ({"layer_000": g["layer_000"]}, s), "which do not fit the params"),
        (
            lambda g, s, p=None: (jax.tree.map(lambda a: jnp.ones((7, 7)), g), s),
            "shapes that can be added to the params",
        ),
        (lambda g, s, p=None: g, "expected a pair"),
        (lambda g, s, p=None: None, r"update returns None: expected a pair \(updates, new state\)"),
    ],
)
def test_updates_that_do_not_fit_are_refused_at_once(update, message):
    with pytest.raises(ConfigError, match=message):
        engine_for(optax.GradientTransformation(lambda p: (), update), 2)


def test_updates_are_added_as_to_any_tree():
    """One number per array is added to all of it, as `optax.apply_updates` does."""
    tx = optax.stateless(lambda grads, _: jax.tree.map(lambda g: -0.1 * jnp.abs(g).mean(), grads))
    engine = engine_for(tx, 3)
    before = jax.device_get(engine.to_layers())
    engine.train_batch(data(1))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(engine.to_layers()), strict=True):
        moved = old - np.asarray(new)
        np.testing.assert_allclose(moved, moved.flat[0], rtol=1e-2)
        assert moved.flat[0] > 0


@pytest.mark.parametrize("what", ["value_and_grad", "evaluate", "to_layers", "lower_train"])
def test_params_of_another_pipeline(what):
    """Of another cut, another number of stages, or the per-layer list: never computed with."""
    batch = make_batch(2)

    def made(cut):
        pipe = jaxpipe.Pipeline(MODELS["tied"](cut), jaxpipe.make_mesh(pipe=len(cut) - 1), 2)
        return pipe, pipe.init(1, batch[0][0])

    pipe, params = made([0, 5, 9])
    others = [made([0, 4, 9])[1], jax.device_get(made([0, 3, 6, 9])[1]), pipe.to_layers(params), None]
    arguments = () if what == "to_layers" else (batch,)
    for other in others:
        with pytest.raises(LayerError, match=r"params is .*from_layers\(other.to_layers\(params\)\)"):
            getattr(pipe, what)(other, *arguments)


@pytest.mark.parametrize(("model", "stages", "ranks"), [("tied", 2, 2), ("untied", 3, 1), ("mixed", 4, 2)])
def test_in_a_hand_written_loop(model, stages, ranks, no_compiles):
    """Ties, layers of one kind apart, integers among the weights, data ranks; eagerly, and without a second compile."""
    pipe = jaxpipe.Pipeline(MODELS[model](), jaxpipe.make_mesh(pipe=stages, data=ranks), 2)
    batch = make_batch(2)
    params = pipe.init(jax.random.key(1), batch[0][0])
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(0.01, weight_decay=0.1, mask=by_ndim))
    mine = pipe.optimizer(tx)
    state = mine.init(params)

    def seen(tree):
        tree = natural(jax.device_get(pipe.to_layers(tree)))
        return jax.tree.map(lambda a: a if np.issubdtype(a.dtype, np.inexact) else None, tree)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wanted, wanted_state = seen(params), tx.init(seen(params))
        for step in range(3):
            _, grads = pipe.value_and_grad(params, batch, jax.random.key(step))
            if step < 2:
                updates, state = mine.update(grads, state, params)
            else:
                with no_compiles():
                    updates, state = mine.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            more, wanted_state = jax.jit(tx.update)(seen(grads), wanted_state, wanted)
            wanted = optax.apply_updates(wanted, more)
    assert error(seen(params), wanted) <= 1e-6 and error(mine.natural_state(state), wanted_state) <= 1e-6


def test_pairs_of_params_trees():
    pipe = jaxpipe.Pipeline(MODELS["tied"](), jaxpipe.make_mesh(pipe=2), 1)
    params = pipe.init(jax.random.key(1), make_batch(1)[0][0])
    tx = pipe.optimizer(optax.lookahead(optax.sgd(0.1), 2, 0.5))
    pair = optax.LookaheadParams(params, params)
    state = tx.init(pair)
    grads, start = params, params
    for _ in range(2):
        updates, state = tx.update(grads, state, pair)
        pair = optax.apply_updates(pair, updates)
    for new, old in zip(jax.tree.leaves(pair.slow), jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(new, 0.9 * old, rtol=1e-6)  # half of two steps of a tenth
    with pytest.raises(ConfigError, match="which is no params tree of this pipeline"):
        tx.init({"w": jnp.ones(3)})
    with pytest.raises(ConfigError, match="which are no params tree of this pipeline"):
        tx.update(jax.tree.leaves(params), state, pair)
    with pytest.raises(ConfigError, match="value_fn= is a function of the params"):
        tx.update(params, state, pair, value_fn=lambda p: p)


# ---------------------------------------------------------------------------------------------------------- checkpoints


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


# --------------------------------------------------------------------------------------------------------------- costs

COLLECTIVE = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("


def moved(text):
    """Entries that come out of the collectives of a compiled program, one number for each of them."""
    found = []
    for match in re.finditer(COLLECTIVE, text):
        shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
        found.append(sum(math.prod(int(d) for d in shape.split(",") if d) for shape in shapes))
    return found


def compiled_update(tx, blocks, stages=4, ends=False):
    """The update of a model of like blocks, compiled from shapes; `ends`: with two layers that occur once."""

    def init(key, x):
        return {"a": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}, "b": {"kernel": jnp.ones((32, 16))}}

    block = jaxpipe.Layer(init, lambda p, x: x, "Block")
    layers = [block] * blocks
    if ends:
        layers = [jaxpipe.Layer(lambda k, x: {"e": jnp.ones((64, 16))}, lambda p, x: x, "Embed"), *layers]
    pipe = jaxpipe.Pipeline(jaxpipe.PipelineModule(layers, partition_method="uniform"), jaxpipe.make_mesh(pipe=stages))
    params = pipe.init(jax.random.key(0), jnp.ones((2, 16)))
    tx = pipe.optimizer(tx)
    state = tx.init(params)
    return jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.float32(1))).lower(params, state, params).compile()


SEPARATE = [
    "sgd",
    "adam",
    "adamw_ndim",
    "adamw_path",
    "lion",
    "lamb",
    "lars",
    "novograd",
    "adaptive_grad_clip",
    "by_path",
]


@pytest.mark.parametrize("name", [*SEPARATE, "adafactor", "muon", "noisy_sgd", "plateau", "rate_per_layer"])
def test_what_treats_layers_separately_moves_nothing(name):
    assert moved(compiled_update(OPTIMIZERS[name], 7).as_text()) == []


@pytest.mark.parametrize("name", ["clip_adamw", "apply_if_finite", "lamb"])
def test_scalars_that_join_layers_travel_together(name):
    """One number per leaf and layer, in one gather; of the layer that occurs once, numbers only."""
    found = moved(compiled_update(OPTIMIZERS[name], 7, ends=True).as_text())
    assert max(found, default=0) <= 4 * 2 * 3 * 2 and len(found) <= 6, found
    assert max(found, default=0) < 16 * 32


def test_arrays_that_meet_are_gathered_once():
    found = moved(compiled_update(optax.flatten(optax.adam(1e-2)), 7).as_text())
    weights = 4 * 2 * (2 * 16 * 32 + 32)  # with padding
    assert weights <= sum(found) <= 2 * weights


def test_the_program_does_not_grow_with_the_layers():
    """64 like layers, a mask by ndim: the instructions of 8."""
    tx = optax.adamw(1e-2, weight_decay=0.1, mask=by_ndim)
    few, many = (len(compiled_update(tx, blocks).as_text().splitlines()) for blocks in (8, 64))
    assert many <= 1.05 * few, (few, many)


def test_settings_can_be_changed_between_steps():
    """Injected hyperparameters are leaves of the state, by their path."""
    engine = engine_for(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), 2)
    before = jax.device_get(engine.to_layers())
    rest = dict(engine.state.opt_state.rest)
    rest[".hyperparams['learning_rate']"] = jnp.zeros_like(rest[".hyperparams['learning_rate']"])
    opt_state = engine.state.opt_state._replace(rest=rest)
    engine.state = type(engine.state)(engine.state.step, engine.state.params, opt_state, engine.state.key)
    engine.train_batch(data(1))
    assert error(jax.device_get(engine.to_layers()), before) == 0 and M == 3
