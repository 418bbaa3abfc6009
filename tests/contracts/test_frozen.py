"""Frozen weights: what is trained gets the gradient and the steps that it has on one device, and nothing is kept or
computed for the rest. Hand-written loops over the oracle's gradients say what is right."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import CheckpointError, ConfigError
from tests.compare import assert_close
from tests.engines import M, batches, engine_for, stream
from tests.models import MODELS, Block, Embedding, cross_entropy, make_batch, tied

# model, what is trained, stages, data ranks, remat, boundaries, further settings
CASES = {
    "one stage": ("tied", r"down|Scale", 1, 1, "layer", "uniform", {}),
    "last layers": ("untied", r"layer_00[5-8]", 4, 1, "none", [0, 1, 5, 6, 9], {}),
    "tied weights alone": ("tied", r"layer_000", 4, 1, "layer", "uniform", {}),
    "a part of each layer": ("tied", r"kernel", 2, 2, "dots", [0, 6, 9], {"zero_stage": 1}),
    "layers unlike in it": ("tied", r"layer_00[246]/up|layer_007", 2, 2, "stage", "uniform", {}),
    "integers, wires": ("mixed", r"layer_00[67]", 4, 2, 2, "uniform", {}),
}


def by_path(layers):
    """All params by path; None is no param."""
    return {
        f"layer_{index:03d}/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for index, layer in enumerate(layers)
        for path, leaf in jax.tree_util.tree_flatten_with_path(layer)[0]
    }


def trained(layers, rule):
    named = by_path(layers)
    return {p: a for p, a in named.items() if re.search(rule, p) and jnp.issubdtype(a.dtype, jnp.inexact)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case):
    model, rule, stages, data, remat, boundaries, settings = case
    module, batch = MODELS[model](boundaries), make_batch(M)
    mesh = jaxpipe.make_mesh(pipe=stages, data=data)
    pipe = jaxpipe.Pipeline(module, mesh, M, remat=remat, trainable=rule, poison=True, **settings)
    params = pipe.init(1, batch[0][0])
    loss, grads = pipe.value_and_grad(params, batch, 2)
    wanted_loss, wanted = jaxpipe.reference.value_and_grad(
        module, pipe.to_layers(params), batch, 2, num_data_ranks=data
    )
    assert_close(loss, wanted_loss, 1e-6)
    found = {path: grad for path, grad in by_path(pipe.to_layers(grads)).items() if grad.dtype != jnp.int32}
    assert_close(found, trained(wanted, rule), 1e-6)
    assert all(jnp.abs(grad).max() > 0 for grad in found.values())


@pytest.mark.parametrize("stages, data, remat", [(1, 1, "layer"), (2, 2, "none"), (4, 1, "layer")])
def test_five_steps(stages, data, remat):
    """With weight decay, clipping by the norm of what is trained, and dropout."""
    rule = r"layer_00[2-5]/down|layer_007"
    boundaries = {1: [0, 9], 2: [0, 4, 9], 4: [0, 1, 4, 6, 9]}[stages]
    settings = {"remat": remat, "gradient_clipping": 0.05}
    engine = engine_for(tied(boundaries), stages, data, optax.adamw(1e-2), trainable=rule, **settings)
    layers, module, tx = jax.device_get(engine.to_layers()), engine.pipe.module, optax.adamw(1e-2)
    params = trained(layers, rule)
    state, key = tx.init(params), jax.random.key(5)

    def put(params):
        leaves = [params.get(path, leaf) for path, leaf in by_path(layers).items()]
        return jax.tree.unflatten(jax.tree.structure(layers), leaves)

    for step, batch in enumerate(batches(5)):
        loss, grads = jaxpipe.reference.value_and_grad(
            module, put(params), batch, jax.random.fold_in(key, step), num_data_ranks=data
        )
        grads = trained(grads, rule)
        norm = optax.tree.norm(grads)
        assert norm > 0.05
        with jax.numpy_dtype_promotion("standard"):
            clipped = {path: grad * 0.05 / norm for path, grad in grads.items()}
            updates, state = tx.update(clipped, state, params)
            params = optax.apply_updates(params, updates)
        assert_close(engine.train_batch(stream([batch])), loss, 1e-5, f"step {step}")
        assert_close(engine.grad_norm, norm, 1e-5, f"step {step}")
    found = by_path(engine.to_layers())
    assert_close(trained(engine.to_layers(), rule), params, 1e-4)
    rest = {path: leaf for path, leaf in by_path(layers).items() if path not in params}
    assert_close({path: found[path] for path in rest}, rest, 0)


def test_nothing_is_kept_for_what_is_frozen():
    full, part = (engine_for(tied(), 2, trainable=rule) for rule in (None, r"layer_002/up/bias"))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(engine.state.opt_state)) for engine in (full, part)]
    assert sizes[1] == 2 * 16 + 1 < sizes[0] / 20  # both moments, and a count
    plans = [engine.pipe.plan(make_batch(M)).bytes_per_rank() for engine in (full, part)]
    assert plans[1]["gradients"] == 4 * 16 and plans[1]["saved"] < plans[0]["saved"]
    lowered = part.lower_train(make_batch(M)).compile().memory_analysis()
    assert lowered.temp_size_in_bytes < full.lower_train(make_batch(M)).compile().memory_analysis().temp_size_in_bytes
    text = part.summary()
    assert re.search(r"^train  16 parameters of [\d,]+; [\d,]+ are frozen", text, re.M), text


def test_what_nothing_trained_lies_before_has_no_backward():
    """Of eight like layers on four ranks. A forward is two products of a block, a backward four more, and dx alone two."""

    def planned(rule):
        layers = [jaxpipe.LayerSpec(Block, 8, 0.0) for _ in range(8)]
        module = jaxpipe.PipelineModule(layers, lambda y, t: ((y - t) ** 2).mean(), "uniform")
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=4), 4, remat="none", trainable=rule)
        batch = jnp.ones((4, 4, 8)), jnp.ones((4, 4, 8))
        params = pipe.init(0, batch[0][0])
        text = pipe.lower_train(params, batch).compile().as_text()
        return pipe.plan(batch), len(re.findall(r" dot\(", text))

    plan, all_products = planned(None)
    assert len(plan.programs) == 3  # the first, those between, the last
    plan, last = planned("layer_00[67]")
    assert len(plan.programs) == 3
    assert [s.has_backward for program in plan.programs for s in program.segments] == [False, False, True]
    plan, first = planned("layer_00[01]")
    assert all(s.has_backward for program in plan.programs for s in program.segments)
    # The ops of each program, those of the one between in two phases. With the first layers trained, the others compute dx.
    assert (all_products, last, first) == (4 * 2 + 4 * 4, 4 * 2 + 4, 4 * 2 + 4 + 3 * 2)


def test_checkpoints_of_other_runs(tmp_path):
    """All weights are in a checkpoint, and the state of the optimizer about what was trained."""
    full = engine_for(tied(), 2)
    full.train_batch(stream(batches(1)))
    full.save_checkpoint(tmp_path, "full")
    part = engine_for(tied(), 4, trainable="down")
    part.load_checkpoint(tmp_path, "full")
    assert_close(part.to_layers(), jax.device_get(full.to_layers()), 0)
    found, wanted = (by_path_of_moments(engine) for engine in (part, full))
    assert found and found.keys() == {path for path in wanted if "down" in path}
    assert_close(found, {path: wanted[path] for path in found}, 0)
    part.train_batch(stream(batches(1, first=1)))
    part.save_checkpoint(tmp_path, "part")

    again = engine_for(tied(), 1, 2, trainable="down")
    again.load_checkpoint(tmp_path, "part")
    assert_close(again.to_layers(), jax.device_get(part.to_layers()), 0)
    assert_close(by_path_of_moments(again), by_path_of_moments(part), 0)
    with pytest.raises(CheckpointError, match="it lacks layer_000 .*train no params that were frozen then"):
        full.load_checkpoint(tmp_path, "part")
    with pytest.warns(UserWarning, match="it lacks layer_000"):
        full.load_checkpoint(tmp_path, "part", load_module_strict=False)
    assert_close(full.to_layers(), jax.device_get(part.to_layers()), 0)


def by_path_of_moments(engine):
    state = engine.optimizer.natural_state(engine.state.opt_state)[0]
    return jax.device_get(by_path([state.mu.get(f"layer_{i:03d}", {}) for i in range(9)]))


def test_what_makes_no_sense():
    for rule, message in [
        (
            "lora",
            r"trainable='lora' is found in the path of no param.*The paths are layer_000/table, layer_001/down/bias",
        ),
        (lambda path: False, "says False for every param"),
        (lambda path: 1, "returned 1 for the path 'layer_000/table'"),
        ("(", "trainable='\\('"),
        (3, "trainable=3 is a int"),
    ]:
        with pytest.raises(ConfigError, match=message):
            engine_for(tied(), 2, trainable=rule)


def test_optimizers_by_hand():
    """`Pipeline.optimizer` takes gradients with None, and gives updates for all; those of frozen params change nothing."""
    pipe = jaxpipe.Pipeline(tied(), jaxpipe.make_mesh(pipe=2), M, trainable=lambda path: path.startswith("layer_003"))
    params = pipe.init(0, make_batch(1)[0][0])
    _, grads = pipe.value_and_grad(params, make_batch(M))
    tx = pipe.optimizer(optax.adamw(1e-2))
    updates, _ = tx.update(grads, tx.init(params), params)
    before, after = by_path(pipe.to_layers(params)), by_path(pipe.to_layers(optax.apply_updates(params, updates)))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("layer_003")}


def test_a_frozen_embedding_is_a_spec_too():
    """Frozen at first: nothing before the block is trained, and inputs are integers."""
    layers = [jaxpipe.LayerSpec(Embedding), jaxpipe.LayerSpec(Block, 8), jaxpipe.LayerSpec(jaxpipe_head)]
    module, batch = jaxpipe.PipelineModule(layers, cross_entropy), make_batch(M)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=3), M, trainable="layer_001")
    params = pipe.init(0, batch[0][0])
    grads = pipe.to_layers(pipe.value_and_grad(params, batch)[1])
    wanted = jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), batch)[1]
    assert_close(grads[1], wanted[1], 1e-6)


def jaxpipe_head():
    return jaxpipe.Layer(lambda key, x: {"w": jax.random.normal(key, (8, 11))}, lambda p, x: x @ p["w"])
