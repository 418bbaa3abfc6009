"""Layers that are not alike: a rank holds its own alone, and what is computed is what one device computes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.executor import owned_places
from jaxpipe.layout import piles
from tests.compare import assert_close

WORDS, WIDE, NARROW, ROWS, LENGTH, M = 24, 8, 6, 4, 5, 5


@pytest.fixture(autouse=True)
def _small_arrays_are_treated_as_large_ones(monkeypatch):
    monkeypatch.setattr(owned_places, "SMALL", 20)
    monkeypatch.setattr(owned_places, "ALIGNED", 1)
    monkeypatch.setattr(piles, "SMALL", 0)


def normal(key, *shape):
    return jax.random.normal(key, shape, jnp.zeros(()).dtype) / shape[0] ** 0.5


def layer(name, apply, *shapes):
    """Weights "a", "b", ... of these shapes, and integers, which have no gradient."""

    def init(key, x):
        keys = jax.random.split(key, len(shapes))
        weights = {chr(97 + i): normal(k, *shape) for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))}
        return {**weights, "n": jnp.arange(3)}

    return jaxpipe.Layer(init, apply, name)


def start(p, ids):
    # A mask of floats that is made of the inputs and read by every layer behind.
    return {"h": p["a"][ids], "ids": ids, "mask": (ids % 3 > 0).astype(p["a"].dtype)}


def wide(p, x):
    return {**x, "h": x["h"] + jnp.tanh(x["h"] @ p["a"] + p["b"][None, None]) * x["mask"][..., None]}


def narrow(p, x):
    return {**x, "low": x["low"] + jnp.sin(x["low"] @ p["a"]) * x["mask"][..., None], "h": x["h"] * 0.9}


def split(p, x):
    return {**x, "low": x["h"] @ p["a"]}


def join(p, x):
    return (x["h"] + x["low"] @ p["a"]) * x["mask"][..., None]


def loss(logits, labels):
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs, labels[..., None], -1).mean()


WIDE_LAYER = layer("Wide", wide, (WIDE, WIDE), (WIDE,))
NARROW_LAYER = layer("Narrow", narrow, (NARROW, NARROW))


def module(boundaries):
    layers = [
        layer("Start", start, (WORDS, WIDE)),
        *[WIDE_LAYER] * 3,
        layer("Split", split, (WIDE, NARROW)),
        *[NARROW_LAYER] * 3,
        layer("Join", join, (NARROW, WIDE)),
        layer("Head", lambda p, x: x @ p["a"] + p["b"][None, None], (WIDE, WORDS), (WORDS,)),
    ]
    return jaxpipe.PipelineModule(layers, loss, partition_method=boundaries)


CUTS = {1: [0, 10], 2: [0, 4, 10], 4: [0, 3, 5, 8, 10]}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(0, WORDS, (M, ROWS, LENGTH)).astype(np.int32) for _ in range(2))


CASES = [
    dict(stages=4, data=1, remat="layer"),
    dict(stages=4, data=2, remat="none", zero_stage=1),
    dict(stages=2, data=2, remat="layer", zero_stage=1),
    dict(stages=2, data=1, remat="stage"),
    dict(stages=4, data=1, remat=2, schedule="gpipe"),
]


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case.values())) for case in CASES])
def test_equals_the_oracle(case):
    case = dict(case)
    stages, data = case.pop("stages"), case.pop("data")
    pipe = jaxpipe.Pipeline(module(CUTS[stages]), jaxpipe.make_mesh(pipe=stages, data=data), M, poison=True, **case)
    data_batch = batch()
    params = pipe.init(3, data_batch[0][0])
    assert set(pipe.layout.piles) == {"Wide", "Narrow"}
    found = pipe.value_and_grad(params, data_batch)
    layers = pipe.to_layers(params)
    wanted = jaxpipe.reference.value_and_grad(pipe.module, layers, data_batch, num_data_ranks=data)
    assert_close((found[0], pipe.to_layers(found[1])), wanted, 1e-6)
    assert all(jnp.abs(grad["a"]).max() > 0 for grad in wanted[1])
    for spread in (False, True):
        value = pipe.evaluate(params, data_batch, spread_loss=spread)
        assert_close(value, found[0], 2e-6, f"spread {spread}")


def test_in_64_bits():
    with jax.enable_x64(True):
        pipe = jaxpipe.Pipeline(module(CUTS[4]), jaxpipe.make_mesh(pipe=4), M, poison=True)
        params = pipe.init(3, batch()[0][0])
        loss, grads = pipe.value_and_grad(params, batch())
        wanted = jaxpipe.reference.value_and_grad(pipe.module, pipe.to_layers(params), batch())
        assert_close((loss, pipe.to_layers(grads)), wanted, 1e-12)


def engine_of(stages, **settings):
    return jaxpipe.initialize(
        module(CUTS[stages]),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=stages),
        example=tuple(a[0] for a in batch()),
        config={"num_micro_batches": M, "gradient_clipping": 0.5, **settings},
        key=5,
    )


def steps(engine, count, first=0):
    return [float(engine.train_batch(iter(list(zip(*batch(n), strict=True))))) for n in range(first, first + count)]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_five_steps_do_not_depend_on_the_stages(dtype, tmp_path):
    one, four = engine_of(1, compute_dtype=dtype), engine_of(4, compute_dtype=dtype)
    tolerance = 2e-5 if dtype is None else 3e-2
    assert_close(steps(four, 5), steps(one, 5), tolerance)
    if dtype is None:
        assert_close(four.to_layers(), one.to_layers(), 1e-3)  # adam makes steps of the rounding of small gradients
        four.save_checkpoint(tmp_path, "four")
        before = jax.device_get(four.to_layers())
        one.load_checkpoint(tmp_path, "four")
        assert_close(one.to_layers(), before, 0)
        assert_close(steps(one, 1, 5), steps(four, 1, 5), 1e-5)


def test_a_mask_costs_no_gradient_traffic():
    plan = jaxpipe.Pipeline(module(CUTS[4]), jaxpipe.make_mesh(pipe=4), M)
    plan.check(tuple(a[0] for a in batch()))
    plan = plan.plan(batch())
    tokens = ROWS * LENGTH
    largest = tokens * (WIDE + NARROW)  # behind Split: both streams
    assert [a.shape for a in plan.codecs["dx"].spec] == [(largest,)], "without the mask"
    sizes = {str(a.dtype): a.shape[0] for a in plan.codecs["y"].spec}
    assert sizes == {"float32": largest + tokens, "int32": tokens}


def test_what_only_inputs_are_behind_is_not_sent_back():
    """No stage but the last one has weights: there is nothing to send, and nothing to compute."""
    layers = [jnp.sin, jnp.cos, layer("Head", lambda p, x: x @ p["a"], (3, 2)), lambda x: x * 2]
    found = jaxpipe.PipelineModule(layers, lambda y, t: ((y - t) ** 2).mean(), partition_method=[0, 2, 4])
    pipe = jaxpipe.Pipeline(found, jaxpipe.make_mesh(pipe=2), 3, poison=True)
    x, t = np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32), np.ones((3, 4, 2), np.float32)
    params = pipe.init(0, x[0])
    loss, grads = pipe.value_and_grad(params, (x, t))
    assert pipe.plan((x, t)).codecs["dx"].spec == []
    wanted = jaxpipe.reference.value_and_grad(found, pipe.to_layers(params), (x, t))
    assert_close((loss, pipe.to_layers(grads)), wanted, 1e-6)
    text = pipe.lower_train(params, (x, t)).compile().as_text()
    assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 1


def test_a_rank_holds_its_own_alone():
    """By the plan: the fullest rank's weights, and as much for gradients; saved values by the need of each rank."""
    pipe = jaxpipe.Pipeline(module(CUTS[4]), jaxpipe.make_mesh(pipe=4), M)
    pipe.check(tuple(a[0] for a in batch()))
    found = pipe.plan(batch()).bytes_per_rank()
    own = []
    for first, end in zip(CUTS[4], CUTS[4][1:], strict=False):
        leaves = jax.tree.leaves(pipe.layout.layer_params[first:end])
        own.append(4 * sum(leaf.size for leaf in leaves))
    assert found["weights"] == found["gradients"] <= 1.2 * max(own) < 0.6 * sum(own)


def test_collectives_are_before_and_behind_the_loop():
    pipe = jaxpipe.Pipeline(module(CUTS[4]), jaxpipe.make_mesh(pipe=4), M)
    params = pipe.init(3, batch()[0][0])
    text = pipe.lower_train(params, batch()).compile().as_text()
    bodies = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) .*?\{\n(.*?)^\}", text, re.M | re.S)}
    entry = bodies[re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]]
    whole = len(re.findall(r" all-to-all\(", text))
    assert whole == len(re.findall(r" all-to-all\(", entry)) > 0, "none is in a loop or a branch"
    assert not re.search(r" all-gather\(", text), "no array is gathered on all ranks"
