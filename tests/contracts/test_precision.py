"""Steps and evaluations in short floats equal those of a one-device loop that casts alike."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from tests.compare import assert_close
from tests.models import LENGTH, MODELS, ROWS, VOCAB, WIDTH, cross_entropy, make_batch

EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10}


@jax.custom_vjp
def squeeze(x):
    return jnp.tanh(x)


squeeze.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, dy: (dy * (1 - y * y),))


def norms(partition="uniform"):
    """Blocks whose norm computes in float32 and hands that on, a float input, an integer, and a key as a value."""

    def start_init(key, x):
        return {"table": jax.random.normal(key, (VOCAB, WIDTH)), "rows": jnp.int32(VOCAB)}

    def start(p, x, *, key):
        return {"h": p["table"][x["ids"]] + x["x"].astype(p["table"].dtype), "key": key, "ids": x["ids"]}

    def block_init(key, x):
        w = jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
        return {"norm": {"scale": 1 + jax.random.uniform(key, (WIDTH,))}, "w": w}

    def block(p, x):
        wide, scale = x["h"].astype(jnp.float32), p["norm"]["scale"].astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * jnp.broadcast_to(scale, wide.shape)
        # A product in the dtype of the weights; the sum is float32, and so is what the layer returns.
        return {**x, "h": wide + (wide.astype(p["w"].dtype) @ p["w"]).astype(jnp.float32)}

    def noise(x):
        if x["key"] is not None:
            x = {**x, "h": x["h"] * jax.random.bernoulli(x["key"], 0.9, x["h"].shape).astype(x["h"].dtype)}
        return {**x, "h": squeeze(x["h"])}

    head = jaxpipe.Layer(
        lambda key, x: jax.random.normal(key, (WIDTH, VOCAB)), lambda w, x: x["h"].astype(w.dtype) @ w, "Head"
    )
    layers = [jaxpipe.Layer(start_init, start, "Start"), *[jaxpipe.Layer(block_init, block, "Block")] * 4, noise, head]
    return jaxpipe.PipelineModule(layers, cross_entropy, partition_method=partition)


def batch_for(name, num_micro_batches):
    ids, labels = make_batch(num_micro_batches)
    if name != "norms":
        return ids, labels
    x = np.random.default_rng(3).normal(size=(*ids.shape, WIDTH)).astype(np.float32)
    return {"ids": ids, "x": x}, labels


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree) if leaf.dtype == np.float32])


# model, stages, data ranks, M, schedule, remat, and what is computed in which dtype
CASES = [
    ("tied", 2, 2, 3, "1f1b", "none", {"compute_dtype": "bfloat16"}),
    ("untied", 3, 1, 2, "eager_1f1b", "layer", {"compute_dtype": "float16", "loss_scale": "dynamic"}),
    ("norms", 2, 1, 3, "1f1b", "stage", {"compute_dtype": "bfloat16", "float32_params": "norm|layer_002"}),
    ("norms", 1, 2, 1, "gpipe", 2, {"compute_dtype": "float16", "loss_scale": 1024.0, "float32_params": "table"}),
]


@pytest.mark.parametrize(
    ("name", "stages", "data", "num_micro_batches", "schedule", "remat", "precision"),
    CASES,
    ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in CASES],
)
def test_loss_and_gradients_are_those_of_a_plain_loop(
    name, stages, data, num_micro_batches, schedule, remat, precision
):
    module = {**MODELS, "norms": norms, "tied": lambda: MODELS["tied"](num_blocks=3)}[name]()
    batch, key = batch_for(name, num_micro_batches), jax.random.key(7)
    mesh = jaxpipe.make_mesh(pipe=stages, data=data)
    pipe = jaxpipe.Pipeline(module, mesh, num_micro_batches, schedule, remat, **precision)
    params = pipe.init(jax.random.key(3), jax.tree.map(lambda a: a[0], batch[0]))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} <= {"float32", "int32"}, "masters are not cast"
    loss, grads = pipe.value_and_grad(params, batch, key)
    layers, found = jax.device_get((pipe.to_layers(params), pipe.to_layers(grads)))
    casts = {name: value for name, value in precision.items() if name != "loss_scale"}
    of = (module, layers, batch, key)
    same_loss, same = jaxpipe.reference.value_and_grad(*of, num_data_ranks=data, **casts)
    long_loss, long = jaxpipe.reference.value_and_grad(*of, num_data_ranks=data)

    epsilon = EPSILON[precision["compute_dtype"]]
    assert loss.dtype == jnp.float32
    assert_close((loss, found), (same_loss, same), 2 * epsilon, "cast alike")
    # Short floats do make a difference here, and the pipeline adds nothing to it.
    error, usual = (np.linalg.norm(flat(each) - flat(long)) for each in (found, same))
    assert usual > epsilon / 100 * np.linalg.norm(flat(long)) and error <= 1.1 * usual
    assert abs(float(loss) - long_loss) <= 1.1 * abs(same_loss - long_loss) + 1e-6

    loss, outputs = pipe.evaluate(params, batch, return_logits=True)
    forward = jax.jit(lambda x: jaxpipe.reference.forward(module, layers, x, **casts))
    wanted = [forward(jax.tree.map(lambda a, m=m: a[m], batch[0])) for m in range(num_micro_batches)]
    assert_close(outputs, np.stack(wanted), 2 * epsilon, "outputs")
    if stages == 3:
        assert_close(pipe.evaluate(params, batch, spread_loss=True), loss, 1e-6, "all ranks share head and loss")


def test_what_moves_is_short():
    """Messages and gathered weights are bfloat16, sums of gradients are float32; a rule takes a layer out of its stack."""
    pipe = jaxpipe.Pipeline(
        norms([0, 2, 5, 7]),
        jaxpipe.make_mesh(pipe=3),
        num_micro_batches=4,
        compute_dtype="bfloat16",
        float32_params="layer_003/w",
    )
    batch = batch_for("norms", 4)
    params = pipe.init(0, jax.tree.map(lambda a: a[0], batch[0]))
    [stack] = pipe.layout.stacks.values()
    assert sorted(stack.places) == [1, 2, 4] and {s.layer for s in pipe.layout.shared.values()} == {0, 3, 6}

    def moved(text, op):
        return re.findall(rf"stablehlo\.{op}\"?[^\n]*?-> tensor<[\dx]*x(\w+)>", text)

    for lowered in (pipe.lower_train(params, batch), pipe.lower_eval(params, batch, spread_loss=False)):
        text = lowered.as_text()
        permuted = moved(text, "collective_permute")
        # Beside what layers compute the integers of the input travel, and nothing is as long as a float32.
        assert set(permuted) == {"bf16", "i32"}, permuted
        # The params that are cut: table and head are short; the one that the rule has found is [8, 8], not cut by 3.
        assert set(moved(text, "all_gather")) <= {"bf16"}
    plan = pipe.plan(batch)
    held = plan.weights.avals()
    assert str(held["stacked"]["Block"]["w"].dtype) == "bfloat16"
    # The one that the rule has found is long, on the rank that uses it; table and head are short.
    assert {str(leaf.dtype): leaf.size for leaf in held["owned"].values()} == {
        "bfloat16": 88,
        "float32": 64,
        "int32": 1,
    }
    sums = jax.eval_shape(plan.weights.blank_gradients, held)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(sums)} == {"float32", "int32"}


# ------------------------------------------------------------------------------------------------------------- training

RATES = optax.piecewise_constant_schedule(0.05, {2: 0.5, 3: 0.5})


def linear():
    layer = jaxpipe.Layer(
        lambda key, x: {"w": jax.random.normal(key, x.shape[-1:] * 2) / 2}, lambda p, x: jnp.tanh(x @ p["w"])
    )
    return jaxpipe.PipelineModule([layer] * 2, lambda y, t: ((y - t) ** 2).mean())


def engine_for(**config):
    x = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    return jaxpipe.initialize(
        linear(),
        optax.adam(RATES),
        mesh=jaxpipe.make_mesh(pipe=2),
        example=(x, x),
        config={"num_micro_batches": 2, "gradient_clipping": 0.1, **config},
    )


def data(seed, factor=1.0):
    """One batch; labels that are 1e20 times as large give gradients that float32 holds, but not times a large scale."""
    rng = np.random.default_rng(seed)
    for _ in range(2):
        x, y = rng.normal(size=(2, 4, 3)).astype(np.float32)
        yield x, y * np.float32(factor)


def kept(engine):
    state = engine.state
    return jax.device_get((state.step, state.params, state.opt_state))


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path, no_compiles):
    """Powers of 2 change no bit of a float32, so that all good steps are exactly those of an engine without a scale."""
    scaled = engine_for(loss_scale=jaxpipe.DynamicScale(initial=2.0**80, window=3))
    plain = engine_for()
    assert scaled.metrics == {} and scaled.skipped_steps == plain.skipped_steps == 0
    scales = []
    for seed, factor in enumerate([1.0, 1e18, 1.0, 1.0, 1.0, 1.0]):
        before = kept(scaled)
        with no_compiles() if seed else contextlib.nullcontext():
            loss = scaled.train_batch(data(seed, factor))
        scales.append(float(scaled.metrics["loss_scale"]))
        assert scaled.metrics["loss"] is loss and scaled.metrics["grad_norm"] is scaled.grad_norm
        if factor == 1.0:
            assert loss == plain.train_batch(data(seed)) and scaled.grad_norm == plain.grad_norm
            assert_close(kept(scaled), kept(plain), 0)
        else:
            assert np.isfinite(loss), "the loss is not scaled"
            assert not np.isfinite(scaled.grad_norm)
            assert_close(kept(scaled), before, 0, "what a skipped step leaves")
    assert set(plain.metrics) == {"loss", "grad_norm"}
    # Halved by the second step, doubled by the third good one behind it.
    assert [scale / 2.0**80 for scale in scales] == [1, 1, 0.5, 0.5, 0.5, 1]
    assert (scaled.skipped_steps, scaled.global_steps, scaled.train_calls) == (1, 5, 6)

    # The scale goes with the checkpoint, and a run may go on with another precision, or none.
    scaled.save_checkpoint(tmp_path, "scaled")
    plain.save_checkpoint(tmp_path, "plain")
    other = engine_for(loss_scale="dynamic")
    other.load_checkpoint(tmp_path, "plain")
    assert float(other.state.loss_scale.scale) == 2.0**16 and other.global_steps == 5
    other.load_checkpoint(tmp_path, "scaled", load_module_only=True)
    assert float(other.state.loss_scale.scale) == 2.0**16
    other.load_checkpoint(tmp_path, "scaled")
    assert_close(other.state.loss_scale, scaled.state.loss_scale, 0)
    assert other.skipped_steps == 1
    plain.load_checkpoint(tmp_path, "scaled")
    assert plain.state.loss_scale is None
    assert_close(kept(plain), kept(scaled), 0)


def test_a_fixed_scale_does_not_skip():
    engine = engine_for(loss_scale=2.0**80)
    before = kept(engine)
    engine.train_batch(data(0, 1e18))
    assert float(engine.metrics["loss_scale"]) == 2.0**80
    assert_close(kept(engine), before, 0)
    with pytest.raises(jaxpipe.errors.NonFiniteError, match="Step 1 had the gradient norm"):
        engine.train_batch(data(1))
    assert engine.skipped_steps == 0


def attention(key_shape, width):
    def init(key, x):
        keys = jax.random.split(key, 4)
        return {n: jax.random.normal(k, (width, width)) / width**0.5 for n, k in zip("qkvo", keys, strict=True)}

    def apply(p, x):
        q, k, v = (x @ p[n] for n in "qkv")
        scores = jnp.einsum("bik,bjk->bij", q, k).astype(jnp.float32) / width**0.5
        mask = jnp.tril(jnp.ones(key_shape, bool))[None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9)).astype(x.dtype)
        return x + jnp.tanh(jnp.einsum("bij,bjk->bik", weights, v)) @ p["o"]

    return jaxpipe.Layer(init, apply, "Attention")


@pytest.mark.parametrize("precision", [{"compute_dtype": "bfloat16"}], ids=["bfloat16"])
def test_a_gpt_learns_as_well_as_in_float32(precision):
    """200 steps; the loss of the last 20 of them within 1 %, on a task that nobody can learn to the end."""
    width = 16
    embed = jaxpipe.Layer(
        lambda key, x: {"tokens": jax.random.normal(key, (VOCAB, width)), "places": jnp.zeros((LENGTH, width))},
        lambda p, ids: p["tokens"][ids] + p["places"][None],
        "Embed",
    )
    head = jaxpipe.Layer(
        lambda key, x: {"w": jax.random.normal(key, (width, VOCAB)) / width**0.5}, lambda p, x: x @ p["w"], "Head"
    )
    module = jaxpipe.PipelineModule([embed, *[attention((LENGTH, LENGTH), width)] * 2, head], cross_entropy)

    def micro_batches():
        rng = np.random.default_rng(0)
        while True:
            x = rng.integers(0, VOCAB, (4 * ROWS, LENGTH))
            before = np.roll(x, 1, axis=1)
            before[:, 0] = 0
            yield x, np.where(rng.random(x.shape) < 0.8, (3 * x + before) % VOCAB, rng.integers(0, VOCAB, x.shape))

    def train(**config):
        engine = jaxpipe.initialize(
            module,
            optax.adam(1e-2),
            mesh=jaxpipe.make_mesh(pipe=2),
            example=next(micro_batches()),
            config={"num_micro_batches": 2, **config},
        )
        steps = micro_batches()
        losses = [engine.train_batch(steps) for _ in range(200)]
        return np.asarray(losses)

    long, short = train(), train(**precision)
    assert long[-20:].mean() < 0.75 * long[0], "it learns"
    assert abs(short[-20:].mean() / long[-20:].mean() - 1) < 0.01
    assert (short != long).any()
