"""Layers with state: loss, gradients and new state are those of a loop over micro-batches on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe.errors import LayerError
from tests.compare import assert_close
from tests.stateful_models import (
    EMA,
    UNEVEN,
    WIDTH,
    Normed,
    Plain,
    check_with_oracle,
    entries,
    loss,
    make_batch,
    module,
    started,
)

CASES = [
    # stages, data, micro-batches, schedule, remat
    (1, 1, 3, "1f1b", "layer"),
    (2, 2, 5, "1f1b", "none"),
    (4, 1, 5, "1f1b", "dots"),
    (4, 2, 2, "gpipe", "layer"),
    (2, 1, 4, "eager_1f1b", "stage"),
    (3, 2, 3, "1f1b", 2),
]


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_loss_gradients_and_new_state(case):
    stages, data, num_micro_batches, schedule, remat = case
    model = module(UNEVEN[stages])
    mesh = jaxpipe.make_mesh(pipe=stages, data=data)
    pipe = jaxpipe.Pipeline(model, mesh, num_micro_batches, schedule, remat, poison=True)
    _, before, after = check_with_oracle(pipe, make_batch(num_micro_batches), data)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), after, before)
    tables = [state.pop("table") for state in changed if "table" in state]
    assert all(jax.tree.leaves(changed)) and not any(tables), "all but what is never written"


@pytest.mark.parametrize("remat", ["layer", 2], ids=["layer", "an interval with a layer left over"])
def test_the_loop_of_flax_itself(remat):
    """Against plain modules that change their own state, so that nothing of jaxpipe is believed."""
    model = jaxpipe.PipelineModule([jaxpipe.LayerSpec(Normed, WIDTH)] * 4, loss, partition_method=[0, 1, 4])
    pipe = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=2), 3, remat=remat)
    batch = make_batch(3)
    params = pipe.init(1, batch[0][0])
    before = started(pipe.to_layers(pipe.init_state(1, batch[0][0])))
    found, grads, after = pipe.value_and_grad(params, batch, layer_state=before)
    plain = Plain(pipe.to_layers(params), before)
    wanted, gradients = plain.value_and_grad(batch)
    assert_close(float(found), wanted, 1e-6, "loss")
    for a, b in zip(jax.tree.leaves(pipe.to_layers(grads)), gradients, strict=True):
        assert_close(np.asarray(a), np.asarray(b), 1e-5, "gradient")
    assert_close(jax.device_get(after), jax.device_get(plain.state()), 1e-6, "state")


def test_what_backwards_need_of_state_is_kept_and_nothing_else():
    batch = make_batch(2)

    def saved(entry, remat):
        model = jaxpipe.PipelineModule([entry] * 2 + [jnp.tanh], loss, partition_method=[0, 3])
        pipe = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=1), 2, remat=remat)
        pipe.init(0, batch[0][0])
        (program,) = pipe.plan(batch).programs
        (segment,) = program.segments
        return [leaf.shape for leaf in segment.unit.saved]

    normed = jaxpipe.LayerSpec(Normed, WIDTH)
    assert saved(normed, "layer") == [(8, WIDTH)], "running statistics are not read, and the table is never written"
    assert saved(EMA, "layer") == [(8, WIDTH), (), (WIDTH,)], "count and mean of its own forward"


def five_steps(stages, data, **config):
    batches = [make_batch(3, seed=step) for step in range(5)]
    engine = jaxpipe.initialize(
        module(UNEVEN[stages]),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=stages, data=data),
        example=(batches[0][0][0], batches[0][1][0]),
        config={"num_micro_batches": 3, **config},
        key=3,
    )
    return engine, batches


def on_one_device(model, engine, batches, data):
    """Five steps of a plain optax loop around the oracle, from what an engine starts with."""
    layers, states = (jax.device_get(tree) for tree in (engine.to_layers(), engine.layer_state()))
    tx = optax.adam(1e-2)
    opt_state = tx.init(layers)
    for batch in batches:
        _, grads, states = jaxpipe.reference.value_and_grad(
            model, layers, batch, num_data_ranks=data, layer_state=states
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(jax.device_get(grads), opt_state)
            layers = optax.apply_updates(layers, updates)
    return layers, states


@pytest.mark.parametrize(("stages", "data"), [(4, 1), (2, 2)])
def test_five_steps_of_an_engine(stages, data, no_compiles):
    engine, batches = five_steps(stages, data, zero_stage=data - 1)
    layers, states = on_one_device(engine.pipe.module, engine, batches, data)
    engine.train_batch(zip(*batches[0], strict=True))
    with no_compiles():
        for batch in batches[1:]:
            engine.train_batch(zip(*batch, strict=True))
    assert_close(jax.device_get(engine.to_layers()), jax.device_get(layers), 2e-4, "params")
    assert_close(engine.layer_state(), states, 2e-5, "state")
    kept = engine.layer_state()
    x, t = make_batch(3, seed=9)
    found = engine.eval_batch(zip(x, t, strict=True))
    outputs = [jaxpipe.reference.forward(engine.pipe.module, engine.to_layers(), m, layer_state=kept) for m in x]
    assert_close(float(found), float(np.mean([loss(y, m) for y, m in zip(outputs, t, strict=True)])), 1e-6)
    ragged = [(x[0], t[0]), (x[1][:5], t[1][:5])]
    whole = float(np.concatenate([(outputs[0] - t[0]) ** 2, (outputs[1][:5] - t[1][:5]) ** 2]).mean())
    assert_close(engine.evaluate(ragged)["loss"], whole, 1e-6)
    (predicted,) = engine.predict([(x[m], None) for m in range(3)])
    assert_close(np.asarray(jaxpipe.fetch(predicted)), np.stack(outputs), 1e-5)
    assert_close(engine.layer_state(), kept, 0, "an evaluation changes nothing")
    assert "layer state" in engine.summary()


def test_evaluations_with_a_tail_that_ranks_share_and_without():
    batch = make_batch(5)
    model = module(UNEVEN[4])
    pipe = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=4), 5)
    params = pipe.init(1, batch[0][0])
    states = started(pipe.to_layers(pipe.init_state(1, batch[0][0])))
    layers = pipe.to_layers(params)
    each = [
        loss(jaxpipe.reference.forward(model, layers, x, layer_state=states), t) for x, t in zip(*batch, strict=True)
    ]
    for spread in (True, False):
        found = pipe.evaluate(params, batch, reduce_output=None, spread_loss=spread, layer_state=states)
        assert_close(np.asarray(found), np.asarray(each), 1e-6, f"spread {spread}")


def test_a_checkpoint_loads_at_another_number_of_stages(tmp_path):
    first, batches = five_steps(4, 1)
    first.train_batch(zip(*batches[0], strict=True))
    first.save_checkpoint(tmp_path)
    second, _ = five_steps(2, 2)
    second.load_checkpoint(tmp_path)
    assert_close(second.layer_state(), first.layer_state(), 0, "state")
    third, _ = five_steps(2, 1)
    third.load_checkpoint(tmp_path, load_module_only=True)
    assert_close(third.layer_state(), first.layer_state(), 0, "the statistics belong to the model")
    assert third.global_steps == 0
    first.train_batch(zip(*batches[1], strict=True))
    assert int(first.layer_state()[1]["calls"]) == 6 and int(second.layer_state()[1]["calls"]) == 3
    fresh = jaxpipe.initialize(
        module(UNEVEN[2]),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=2),
        example=(batches[0][0][0], batches[0][1][0]),
        config={"num_micro_batches": 3},
        layers=first.to_layers(),
        layer_state=first.layer_state(),
    )
    assert_close(fresh.layer_state(), first.layer_state(), 0)


def test_a_step_that_is_not_finite_keeps_the_state():
    engine, batches = five_steps(2, 1)
    engine.train_batch(zip(*batches[0], strict=True))
    before = engine.layer_state()
    x, t = batches[1]
    engine.train_batch(zip(x, np.full_like(t, np.inf), strict=True))
    assert_close(engine.layer_state(), before, 0)


@jax.numpy_dtype_promotion("standard")  # flax mixes dtypes
def test_state_stays_long_whatever_a_step_computes_in():
    engine, batches = five_steps(2, 1, compute_dtype="bfloat16")
    engine.train_batch(zip(*batches[0], strict=True))
    after = engine.layer_state()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(after)} == {"float32", "int32"}
    start, _ = five_steps(2, 1, compute_dtype="bfloat16")
    _, _, wanted = jaxpipe.reference.value_and_grad(
        start.pipe.module,
        start.to_layers(),
        batches[0],
        layer_state=start.layer_state(),
        compute_dtype="bfloat16",
    )
    assert_close(after, wanted, 2e-2, "state")


class Synced(nnx.Module):
    def __init__(self, axis_name, *, rngs):
        self.norm = nnx.BatchNorm(WIDTH, axis_name=axis_name, momentum=0.9, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(self.norm(x)))


class LinenSynced(linen.Module):
    axis_name: str | None

    @linen.compact
    def __call__(self, x, train: bool):
        return x + linen.BatchNorm(use_running_average=not train, axis_name=self.axis_name, momentum=0.9)(jnp.tanh(x))


def test_statistics_over_all_data_ranks():
    """They are those of the whole micro-batch, gradients included."""
    batch = make_batch(3)

    def model(axis):
        kinds = [jaxpipe.LayerSpec(Synced, axis), jaxpipe.LayerSpec(LinenSynced, axis)]
        return jaxpipe.PipelineModule(kinds * 2 + [jnp.tanh], loss, partition_method=[0, 1, 5])

    pipe = jaxpipe.Pipeline(model("data"), jaxpipe.make_mesh(pipe=2, data=2), 3)
    params = pipe.init(0, batch[0][0])
    states = started(pipe.to_layers(pipe.init_state(0, batch[0][0])))
    found, grads, after = pipe.value_and_grad(params, batch, layer_state=states)
    wanted = jaxpipe.reference.value_and_grad(model(None), pipe.to_layers(params), batch, layer_state=states)
    assert_close(found, wanted[0], 1e-6, "loss")
    assert_close(pipe.to_layers(grads), wanted[1], 3e-5, "gradient")
    assert_close(after, wanted[2], 1e-5, "state")


def test_a_tied_layer_that_changes_its_state_is_refused_and_constants_are_right():
    example = make_batch(1)[0][0]
    tie = jaxpipe.TiedLayerSpec("tie", Normed, WIDTH)
    pipe = jaxpipe.Pipeline(jaxpipe.PipelineModule([tie, jnp.tanh, tie], loss), jaxpipe.make_mesh(pipe=2))
    with pytest.raises(LayerError, match=r"layer 0 \(Normed\) changes its state '.*', and is tied: layers \[0, 2\]"):
        pipe.init(0, example)

    class Scaled(nnx.Module):
        def __init__(self, *, rngs):
            self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.table = nnx.BatchStat(jnp.linspace(0.5, 1.5, WIDTH))

        def __call__(self, x):
            return self.dense(x * self.table[...][None])

    batch = make_batch(3)
    tie = jaxpipe.TiedLayerSpec("tie", Scaled)
    model = jaxpipe.PipelineModule([tie, jnp.tanh, EMA, tie], loss, partition_method=[0, 1, 2, 4])
    pipe = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=3), 3)
    params = pipe.init(0, batch[0][0])
    states = started(pipe.to_layers(pipe.init_state(0, batch[0][0])))
    found, grads, after = pipe.value_and_grad(params, batch, layer_state=states)
    wanted = jaxpipe.reference.value_and_grad(model, pipe.to_layers(params), batch, layer_state=states)
    assert_close((found, pipe.to_layers(grads), after), wanted, 1e-5)
    assert states[3] == {} and set(states[0]) == {"table"}


def test_params_alone_and_the_jit_of_the_caller():
    """Without `init`, the shapes of the state follow from the first batch; in a jit a tree of state goes round."""
    batch = make_batch(3)
    model = module(UNEVEN[2])
    made = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=2), 3)
    params = made.init(0, batch[0][0])
    states = made.init_state(0, batch[0][0])
    pipe = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=2), 3)
    params = pipe.from_layers(made.to_layers(params))
    for call in (pipe.value_and_grad, pipe.evaluate):
        with pytest.raises(LayerError, match=r"layer 0 \(LinenNormed\) has state, .* layer_state=... is needed"):
            call(params, batch)
    first, grads, after = pipe.value_and_grad(params, batch, layer_state=states)
    step = jax.jit(lambda params, batch, states: pipe.value_and_grad(params, batch, layer_state=states))
    assert_close(step(params, batch, states), (first, grads, after), 1e-6)
    assert pipe.lower_train(params, batch).compile() and pipe.lower_eval(params, batch).compile()
    for given in (None, [{}] * 9):
        with pytest.raises(LayerError, match=r"layer 0 \(LinenNormed\) has state, and was given none"):
            jaxpipe.reference.value_and_grad(model, made.to_layers(params), batch, layer_state=given)
    with pytest.raises(LayerError, match=r"layer_state is a list of 2: expected a list of 9"):
        jaxpipe.reference.forward(model, made.to_layers(params), batch[0][0], layer_state=[{}] * 2)


def test_an_nnx_param_that_is_written_is_still_an_error():
    class Writes(nnx.Module):
        def __init__(self, *, rngs):
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(WIDTH))

        def __call__(self, x):
            self.scale[...] = self.scale[...] * 2
            return self.norm(x) * self.scale[...][None]

    with pytest.raises(LayerError, match="writes to the nnx.Param 'scale' in its call"):
        jaxpipe.PipelineModule([jaxpipe.LayerSpec(Writes)]).shapes(make_batch(1)[0][0])


def test_a_step_compiled_from_shapes_counts_the_state():
    x, t = make_batch(1)
    report = jaxpipe.compile(
        module(UNEVEN[2]),
        optax.sgd(0.1),
        mesh=jaxpipe.make_mesh(pipe=2),
        example=(jax.ShapeDtypeStruct(x[0].shape, x.dtype), jax.ShapeDtypeStruct(t[0].shape, t.dtype)),
        config={"num_micro_batches": 2},
    )
    assert report.bytes_per_device["layer state"] > 0


def test_the_entries_cover_every_kind_of_place():
    """What the cases rest on: state in stacks and alone, in the body and in the tail, with and without params."""
    pipe = jaxpipe.Pipeline(module(UNEVEN[4]), jaxpipe.make_mesh(pipe=4), 2)
    batch = make_batch(2)
    pipe.init(0, batch[0][0])
    states = pipe.states.layout
    assert len(states.stacks) == 2 and len(states.shared) == 3 and len(entries()) == 9
    last = pipe.plan(batch).programs[-1]
    assert [part.state is not None for part in last.tail.parts] == [True, False, True]


def test_built_modules_begin_with_their_own_state_and_come_back_with_the_new_one():
    modules = [Normed(WIDTH, rngs=nnx.Rngs(seed)) for seed in range(3)]
    for seed, each in enumerate(modules):
        each.norm.mean[...] = jnp.full(WIDTH, 0.1 + seed)
    x, t = make_batch(3)
    engine = jaxpipe.initialize(
        jaxpipe.PipelineModule(modules, loss),
        optax.sgd(0.1),
        mesh=jaxpipe.make_mesh(pipe=2),
        example=(x[0], t[0]),
        config={"num_micro_batches": 3},
    )
    before = engine.layer_state()
    assert [float(state["norm"]["mean"][0]) for state in before] == pytest.approx([0.1, 1.1, 2.1])
    engine.train_batch(zip(x, t, strict=True))
    after = engine.layer_state()
    found = [nnx.to_pure_dict(nnx.state(each, nnx.BatchStat))["norm"] for each in engine.modules()]
    assert_close(found, [state["norm"] for state in after], 0)
    assert float(modules[1].norm.mean[0]) == pytest.approx(1.1), "the user's own stays as it was"
    assert int(after[2]["calls"]) == 3 and int(before[2]["calls"]) == 0
