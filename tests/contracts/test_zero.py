"""`zero_stage=1`: weights and optimizer state are cut over the data ranks, and nothing else is different."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError
from tests.compare import assert_close
from tests.optimizer.optimizers import by_ndim

M, ROWS, WIDTH, WORDS = 3, 12, 7, 13


def dense(key, *shape):
    return jax.random.normal(key, shape) / 3


def block_init(key, x):
    keys = jax.random.split(key, 3)
    return {
        "w": dense(keys[0], WIDTH, WIDTH),  # no dim divides
        "up": dense(keys[1], WIDTH, 6),
        "down": dense(keys[2], 6, WIDTH),
        "b": dense(keys[2], WIDTH),
        "gain": jnp.float32(0.9),
        "ids": jnp.arange(3),  # has no gradient
    }


def block(p, x):
    return (
        x
        + jnp.tanh(x @ p["w"] + p["b"][None]) * p["gain"]
        + (x @ p["up"]) @ p["down"] / 4
        + p["ids"].sum().astype(jnp.float32) / 9
    )


def odd_init(key, x):
    keys = jax.random.split(key)
    return {"k": dense(keys[0], WIDTH, 8), "m": dense(keys[1], 8, WIDTH), "g": dense(key, 3)}


BLOCK = jaxpipe.Layer(block_init, block, "Block")
ODD = jaxpipe.Layer(odd_init, lambda p, x: x @ p["k"] @ p["m"] * p["g"].sum(), "Odd")


def table():
    return jaxpipe.Layer(lambda key, x: {"t": dense(key, WORDS, WIDTH)}, lambda p, x: p["t"][x], "Table")


def loss_fn(y, t):
    return optax.softmax_cross_entropy_with_integer_labels(y, t).mean()


def module():
    head = jaxpipe.TiedLayerSpec("table", table, forward_fn=lambda p, x: x @ p["t"].T)
    layers = [jaxpipe.TiedLayerSpec("table", table), BLOCK, BLOCK, ODD, BLOCK, BLOCK, BLOCK, head]
    return jaxpipe.PipelineModule(layers, loss_fn)


def batch(step=0):
    rng = np.random.default_rng(step)
    return tuple(rng.integers(0, WORDS, (M, ROWS), dtype=np.int32) for _ in range(2))


def engine_on(pipe, data, zero, seed=3):
    return jaxpipe.initialize(
        module(),
        optax.adamw(1e-2, weight_decay=0.1, mask=by_ndim),
        mesh=jaxpipe.make_mesh(pipe=pipe, data=data),
        example=tuple(a[0] for a in batch()),
        config={"num_micro_batches": M, "gradient_clipping": 0.5, "zero_stage": zero},
        key=seed,
    )


def train(engine, steps, first=0):
    losses = [
        float(engine.train_batch(iter(list(zip(*batch(step), strict=True))))) for step in range(first, first + steps)
    ]
    return losses, float(engine.grad_norm)


def everything(engine):
    """Weights by layer and the optimizer's state as optax holds it, on the host."""
    state = engine.optimizer.natural_state(jax.device_get(engine.state.opt_state))
    return jax.device_get((engine.to_layers(), state))


def on_a_device(tree):
    """Bytes on the device that holds most."""
    held = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


@functools.cache
def trained(pipe, data, zero):
    """An engine after two steps, and what it had then: losses and norm, everything, the loss of an evaluation."""
    engine = engine_on(pipe, data, zero)
    losses = train(engine, 2)
    evaluated = float(engine.eval_batch(iter(list(zip(*batch(9), strict=True)))))
    return engine, losses, everything(engine), evaluated


@pytest.mark.parametrize(("pipe", "data"), [(1, 4), (2, 3), (4, 2)])
def test_training_is_that_of_stage_0(pipe, data, no_compiles):
    whole, losses, wanted, evaluated = trained(pipe, data, 0)
    cut, cut_losses, found, cut_evaluated = trained(pipe, data, 1)
    assert_close(cut_losses, losses, 2e-6)
    assert_close(cut_evaluated, evaluated, 2e-6)
    assert_close(found[0], wanted[0], 2e-5)  # adam makes steps of the rounding of small gradients
    for name in ("params", "opt_state"):
        before, after = (on_a_device(getattr(engine.state, name)) for engine in (whole, cut))
        assert after < before * 1.45 / data, "odd dims are padded, and scalars are whole"
    if pipe == 4:  # an engine that no other test uses
        with no_compiles():
            train(cut, 1, first=5)


def test_gradients_are_those_of_the_oracle():
    mesh, step = jaxpipe.make_mesh(pipe=2, data=2), batch(4)
    pipe = jaxpipe.Pipeline(module(), mesh, M, zero_stage=1)
    params = pipe.init(1, step[0][0])
    loss, grads = pipe.value_and_grad(params, step)
    for leaf, grad in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
        assert (leaf.shape, leaf.dtype) == (grad.shape, grad.dtype) and leaf.sharding == grad.sharding
    wanted = jaxpipe.reference.value_and_grad(pipe.module, jax.device_get(pipe.to_layers(params)), step)
    assert_close((loss, pipe.to_layers(grads)), wanted, 1e-6)
    again = pipe.from_layers(pipe.to_layers(grads))
    assert_close(again, grads, 0)  # the padding is zeros
    # The same weights as without data ranks, whatever is cut.
    alone = jaxpipe.Pipeline(module(), jaxpipe.make_mesh())
    assert_close(pipe.to_layers(params), alone.to_layers(alone.init(1, step[0][0])), 1e-7)


def loops_and_rest(text):
    """The collectives of a compiled program as (name, groups), those of the computations that loops run, and all others."""
    bodies = re.split(r"\n(?=%|ENTRY)", text)
    named = {body.split()[0 if body.startswith("%") else 1].lstrip("%"): body for body in bodies if body.strip()}

    def reached(name):
        for inner in re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", named.get(name, "")):
            if inner not in seen:
                seen.add(inner)
                reached(inner)

    seen = set()
    for body in bodies:
        for start in re.findall(r"while\(.*?body=%?([\w.\-]+)", body):
            seen.add(start)
            reached(start)
    pattern = r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    inside = [c for name in seen for c in re.findall(pattern, named.get(name, ""))]
    outside = [c for name, body in named.items() if name not in seen for c in re.findall(pattern, body)]
    return inside, outside


def test_one_gather_before_the_loop_and_one_scatter_behind_it():
    """In the program of loss and gradient on one rank: nothing in the loop, and the only other sums are of scalars."""
    pipe = jaxpipe.Pipeline(module(), jaxpipe.make_mesh(pipe=1, data=4), M, zero_stage=1)
    params = pipe.init(1, batch()[0][0])
    inside, outside = loops_and_rest(pipe.lower_train(params, batch()).compile().as_text())
    assert not inside
    assert outside.count("all-gather") == 2, "of floats, and of integers"
    assert outside.count("reduce-scatter") == 1 and set(outside) == {"all-gather", "reduce-scatter", "all-reduce"}
    two = jaxpipe.Pipeline(module(), jaxpipe.make_mesh(pipe=2, data=2), M, zero_stage=1)
    text = two.lower_train(two.init(1, batch()[0][0]), batch()).compile().as_text()
    assert set(loops_and_rest(text)[0]) == {"collective-permute"}


def test_checkpoints_move_between_stages_and_numbers_of_data_ranks(tmp_path):
    for zero in (0, 1):
        saved, _, wanted, _ = trained(2, 3, zero)
        saved.save_checkpoint(tmp_path, f"of {zero}")
        for pipe, data, there in [(1, 4, 1), (4, 2, 1), (2, 2, 0)]:
            engine = engine_on(pipe, data, there, seed=8)
            engine.load_checkpoint(tmp_path, f"of {zero}")
            assert_close(everything(engine), wanted, 0)
            if (pipe, zero) == (4, 0):
                engine.save_checkpoint(tmp_path, "back")
    engine = engine_on(2, 2, 0, seed=8)
    engine.load_checkpoint(tmp_path, "back")
    assert_close(everything(engine), trained(2, 3, 0)[2], 0)
    losses = train(engine_on(1, 1, 1), 2)[0]  # without data ranks there is nothing to cut
    assert_close(losses, trained(1, 4, 0)[1][0], 2e-6)


def test_stages_that_are_not_there():
    for stage in (2, 3):
        with pytest.raises(ConfigError, match=f"zero_stage={stage}.*Stage {stage} is not there: .*Use zero_stage=1"):
            engine_on(1, 2, stage)
        with pytest.raises(ConfigError, match=f"zero_stage={stage}"):
            jaxpipe.Pipeline(module(), jaxpipe.make_mesh(), zero_stage=stage)
