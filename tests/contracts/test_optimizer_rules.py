"""What may be an optimizer, what it is given, and how it is used in a hand-written loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, LayerError
from tests.models import MODELS, make_batch
from tests.optimizer.engines import M, data, engine_for
from tests.optimizer.optimizers import by_ndim, error, natural, only_init


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
