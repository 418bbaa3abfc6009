"""The engine: same training as a plain optax loop, whatever the mesh; nothing compiles twice; nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import DataError, NonFiniteError
from tests.compare import assert_close
from tests.engines import M, batches, engine_for, stream
from tests.models import make_batch, masked_cross_entropy, tied, untied


@pytest.mark.parametrize("dropout", [True, False])
def test_five_steps_equal_a_plain_loop_and_do_not_depend_on_the_stages(dropout):
    """AdamW with clipping and weight decay on tied weights, five steps."""
    make = tied if dropout else (lambda **options: untied(**options))
    # With a small eps Adam turns the rounding of gradients near zero into steps of full size.
    clip, optimizer = 0.05, optax.adamw(1e-2, eps=1e-4, weight_decay=0.1)
    results = {}
    for stages in (1, 4):
        engine = engine_for(make(loss=masked_cross_entropy), stages, 1, optimizer, gradient_clipping=clip)
        start = engine.to_layers()
        data = stream(batches(5))
        losses = [float(engine.train_batch(data)) for _ in range(5)]
        results[stages] = (engine.to_layers(), losses, float(engine.grad_norm), engine.global_steps)

    module = make(loss=masked_cross_entropy)
    layers = jax.device_get(start)
    state = optimizer.init(layers)
    losses = []
    for step, batch in enumerate(batches(5)):
        key = jax.random.fold_in(jax.random.key(5), step)
        loss, grads = jaxpipe.reference.value_and_grad(module, layers, batch, key)
        norm = optax.tree.norm(grads)
        assert norm > clip, "a clip that never acts tests nothing"
        grads = jax.tree.map(lambda g, n=norm: g * (clip / n), grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, layers)
            layers = optax.apply_updates(layers, updates)
        losses.append(float(loss))
    for stages, (found, found_losses, found_norm, steps) in results.items():
        assert_close(found, jax.device_get(layers), 1e-6, f"{stages} stages")
        np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
        np.testing.assert_allclose(found_norm, float(norm), rtol=1e-5)
        assert steps == 5
    assert_close(results[4][0], jax.device_get(results[1][0]), 1e-6, "4 stages against 1")


def test_initial_weights_do_not_depend_on_mesh_or_partition():
    wanted = jax.device_get(engine_for(tied(), 1).to_layers())
    for stages, data, partition in [(4, 2, "uniform"), (3, 1, [0, 1, 2, 9])]:
        assert_close(engine_for(tied(partition), stages, data).to_layers(), wanted, 1e-7, f"{stages} x {data}")
    blocks = [layer["up"]["kernel"] for layer in wanted[1:7]]
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(blocks, blocks[1:], strict=False)), "layers differ"


def test_no_device_holds_the_whole_model_or_its_optimizer_state():
    engine = engine_for(tied(), stages=4, data=1)
    leaves = jax.tree.leaves((engine.state.params, engine.state.opt_state))
    whole = sum(leaf.nbytes for leaf in leaves)
    for device in engine.pipe.mesh.devices.flat:
        mine = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device)
        assert mine < 0.3 * whole


def test_layers_go_in_and_out():
    first = engine_for(untied(), stages=3)
    layers = jax.device_get(first.to_layers())
    second = jaxpipe.initialize(
        untied([0, 5, 9]),
        optax.sgd(0.1),
        mesh=jaxpipe.make_mesh(pipe=2),
        example=tuple(a[0] for a in make_batch(1)),
        config={"num_micro_batches": M},
        layers=layers,
    )
    assert second.partition == (0, 5, 9)
    assert_close(second.to_layers(), layers, 0)
    a, b = (e.eval_batch(stream(batches(1))) for e in (first, second))
    assert_close(a, np.asarray(b), 1e-6)


def test_the_second_step_does_not_compile_and_state_is_donated(no_compiles):
    engine = engine_for(tied(), stages=2, data=2)
    data = stream(batches(4))
    engine.train_batch(data)
    before = engine.state
    with no_compiles():
        engine.train_batch(data)
        loss = engine.train_batch(data)
    assert loss.shape == () and isinstance(loss, jax.Array)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


def test_an_iterator_that_ends_early_changes_nothing():
    engine = engine_for(tied(), stages=2)
    engine.train_batch(stream(batches(1)))
    before = jax.device_get(engine.state.params)
    with pytest.raises(DataError, match="data_iter ended after 2 of 3 micro-batches.* the state is unchanged"):
        engine.train_batch(iter(list(stream(batches(1)))[:2]))
    assert_close(engine.state.params, before, 0)
    assert engine.global_steps == 1
    engine.train_batch(stream(batches(1)))


def nan_if_label_ten(logits, labels):
    loss = masked_cross_entropy(logits, labels)
    return jaxpipe.Weighted(jnp.where((labels == 10).any(), jnp.nan, loss.total), loss.weight)


def test_a_step_that_is_not_finite_keeps_the_state_and_is_reported():
    engine = engine_for(tied(loss=nan_if_label_ten), stages=2)
    good = [(x, np.minimum(y, 9)) for x, y in batches(3)]
    bad = [(x, np.full_like(y, 10)) for x, y in batches(1)]
    engine.train_batch(stream(good[:1]))
    before = jax.device_get((engine.state.params, engine.state.opt_state, engine.state.step))
    assert np.isnan(float(engine.train_batch(stream(bad))))
    assert_close((engine.state.params, engine.state.opt_state, engine.state.step), before, 0)
    with pytest.raises(NonFiniteError, match="Step 2 had the loss nan. It did not change the state"):
        engine.train_batch(stream(good[1:2]))
    assert np.isfinite(float(engine.train_batch(stream(good[1:2]))))
    assert engine.global_steps == 2
