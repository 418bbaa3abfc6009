"""Extra losses and metrics of layers, and metrics of `loss_fn`, in training and evaluation, against a loop in plain JAX."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe import metrics
from tests.compare import assert_close

M, ROWS, WIDTH, EXPERTS = 3, 4, 4, 3


@jax.custom_vjp
def bent(x):
    return x


# Not linear in the cotangent: what a backward pass starts from has to be the gradient of the objective.
bent.defvjp(lambda x: (x, None), lambda _, g: (0.02 * jnp.tanh(50 * g),))


def normal(key, *shape):
    return jax.random.normal(key, shape, jnp.zeros(()).dtype) / shape[0] ** 0.5


def block_init(key, x):
    return {"w": normal(key, WIDTH, WIDTH), "router": normal(jax.random.fold_in(key, 1), WIDTH, EXPERTS)}


def block(params, x):
    chances = jax.nn.softmax(x @ params["router"])
    share = chances.mean(0)
    return jaxpipe.LayerOut(
        bent(x + jnp.tanh(x @ params["w"]) * chances.max(-1, keepdims=True)),
        losses={"balance": 0.3 * EXPERTS * (share**2).sum()},  # not linear in the rows
        metrics={
            "entropy": -(chances * jnp.log(chances)).sum(-1).mean(),
            "busiest": metrics.Max(share.max()),
            "squares": ((x**2).sum(), float(x.size)),
            "share": share,
        },
    )


def z(x):
    return jaxpipe.LayerOut(1.1 * x, {"z": 0.2 * (x**2).mean(), "nothing": 0.0})


def head(params, x):
    y = bent(x) @ params["w"]
    return jaxpipe.LayerOut(y, {"z": 0.1 * jnp.square(jax.nn.logsumexp(y, -1)).mean()}, {"calls": metrics.Sum(1)})


def mean_loss(y, labels):
    error = y - labels["t"]
    return (error**2).mean(), {"error": jnp.abs(error).mean(), "count": metrics.Sum(1), "rows": metrics.Concat(y[:, 0])}


def weighted_loss(y, labels):
    each = ((y - labels["t"]) ** 2).mean(-1)
    found = {"worst": metrics.Max(each.max()), "close": ((each < 1).sum(), 2 * each.size)}
    return jaxpipe.Weighted((labels["w"] * each).sum(), labels["w"].sum()), found


LAYERS = [
    jaxpipe.Layer(block_init, lambda params, x: jnp.tanh(x @ params["w"]), "Enter"),
    *[jaxpipe.Layer(block_init, block, "Block")] * 2,
    z,
    *[jaxpipe.Layer(block_init, block, "Block")] * 2,
    lambda x: x + 0.1,
    jaxpipe.Layer(block_init, head, "Head"),
]


def batch_of(weights=None, rows=ROWS, seed=0, count=M):
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=(2, count, rows, WIDTH)).astype(jnp.zeros(()).dtype)
    weights = rng.uniform(0.1, 2, (count, rows)) if weights is None else weights
    return x, {"t": t, "w": np.asarray(weights, x.dtype)}


def run(layers, x):
    """What the layers make of the rows of one data rank, with all that each of them gives beside."""
    found = []
    for entry, params in zip(LAYERS, layers, strict=True):
        out = entry.apply(params, x) if isinstance(entry, jaxpipe.Layer) else entry(x)
        x, losses, more = (out.y, out.losses, out.metrics) if isinstance(out, jaxpipe.LayerOut) else (out, {}, {})
        found.append((losses, more))
    return x, found


def by_hand(loss_fn, layers, batch, data, counts=True):
    """(objective, what a step reports), from the rules as they are written down; `counts`: whether any weight is not 0."""

    def part(x, labels):
        y, found = run(layers, x)
        loss, own = loss_fn(y, labels)
        total, weight = (loss.total, loss.weight) if loss_fn is weighted_loss else (loss, jnp.ones_like(loss))
        return total, weight, [losses for losses, _ in found], [found[i][1] for i in (1, 2, 4, 5)], own

    parts = jax.tree.map(
        lambda a: a.reshape(-1, a.shape[1] // data, *a.shape[2:]), batch
    )  # micro-batches and data ranks
    totals, weights, losses, blocks, own = jax.vmap(part)(*parts)
    extras = {}
    for name, value in itertools.chain.from_iterable(each.items() for each in losses):
        extras[name] = extras.get(name, 0.0) + value.mean()
    reported = {
        "entropy": sum(each["entropy"].mean() for each in blocks) / 4,
        "busiest": jnp.stack([each["busiest"].value for each in blocks]).max(),
        "squares": sum(each["squares"][0].sum() for each in blocks) / sum(each["squares"][1].sum() for each in blocks),
        "share": sum(each["share"].mean(0) for each in blocks) / 4,
        "calls": jnp.int32(len(totals)),
    }
    if loss_fn is mean_loss:
        reported |= {"error": own["error"].mean(), "count": jnp.int32(len(totals))}
    else:
        hits, all_of_them = own["close"]
        reported |= {"worst": own["worst"].value.max(), "close": hits.sum() / all_of_them.sum()}
    of_loss_fn = totals.sum() / jax.lax.stop_gradient(weights.sum()) if counts else 0.0
    return of_loss_fn + sum(extras.values()), {**extras, **reported}


# Stages, data ranks, boundaries, rematerialisation, loss.
CASES = [
    (1, 1, "uniform", "none", mean_loss),
    (2, 2, [0, 1, 8], "layer", weighted_loss),
    (4, 2, "uniform", "dots", mean_loss),
    (4, 1, [0, 1, 3, 5, 8], 2, weighted_loss),
    (4, 2, [0, 2, 3, 7, 8], "none", weighted_loss),
]


def pipeline(stages, data, boundaries, remat, loss_fn, **settings):
    module = jaxpipe.PipelineModule(LAYERS, loss_fn, boundaries)
    return jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages, data=data), M, remat=remat, **settings)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(getattr(a, "__name__", str(a)) for a in case))
def test_gradients_in_64_bits(case):
    """The objective and each gradient, where what is left is rounding; the oracle as well."""
    with jax.enable_x64(True):
        pipe, loss_fn, data = pipeline(*case, poison=True), case[-1], case[1]
        params = pipe.init(jax.random.key(0), np.zeros((ROWS, WIDTH)))
        layers = jax.device_get(pipe.to_layers(params))
        tables = [None] if loss_fn is mean_loss else [None, np.zeros((M, ROWS)), np.arange(M * ROWS).reshape(M, -1) % 2]
        hand = jax.jit(jax.value_and_grad(lambda *args: by_hand(loss_fn, *args)[0]), static_argnums=(2, 3))
        for weights in tables:
            batch = batch_of(weights)
            if weights is not None and not weights.any():
                batch[1]["t"][:] = np.inf  # 0 x infinity does not get into the gradient of the extra losses
            wanted = jax.device_get(hand(layers, batch, data, weights is None or bool(weights.any())))
            loss, grads = pipe.value_and_grad(params, batch)
            assert_close((loss, pipe.to_layers(grads)), wanted, 1e-12)
            oracle = jaxpipe.reference.value_and_grad(pipe.module, layers, batch, num_data_ranks=data)
            assert_close(jax.device_get(oracle), wanted, 1e-12, "reference")


def engine_for(stages, data, boundaries="uniform", remat="layer", loss_fn=weighted_loss, tx=None, **config):
    x, labels = batch_of(count=1)
    return jaxpipe.initialize(
        jaxpipe.PipelineModule(LAYERS, loss_fn, boundaries),
        tx or optax.adam(0.01),
        mesh=jaxpipe.make_mesh(pipe=stages, data=data),
        example=(x[0], {name: a[0] for name, a in labels.items()}),
        config={"num_micro_batches": M, "remat": remat, **config},
        key=jax.random.key(1),
    )


def items_of(batch):
    return [jax.tree.map(lambda a, m=m: a[m], batch) for m in range(len(batch[0]))]


@pytest.mark.parametrize(("stages", "data", "remat"), [(1, 2, "none"), (2, 1, "layer"), (4, 2, "layer")])
def test_five_steps(stages, data, remat):
    engine, tx = engine_for(stages, data, remat=remat), optax.adam(0.01)
    layers = jax.device_get(engine.to_layers())
    state = tx.init(layers)
    grad = jax.jit(jax.value_and_grad(lambda a, batch: by_hand(weighted_loss, a, batch, data), has_aux=True))
    assert engine.metrics == {}
    for step in range(5):
        batch = batch_of(seed=step)
        (loss, wanted), grads = grad(layers, batch)
        assert_close(engine.train_batch(iter(items_of(batch))), loss, 1e-5)
        wanted |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        assert_close(engine.metrics, {name: jnp.asarray(a) for name, a in wanted.items()}, 2e-5, f"step {step}")
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, state = tx.update(grads, state, layers)
        layers = optax.apply_updates(layers, updates)
    assert_close(engine.to_layers(), jax.device_get(layers), 1e-5)


@pytest.mark.parametrize("settings", [{"zero_stage": 1}, {"compute_dtype": "bfloat16", "loss_scale": 256.0}], ids=str)
def test_other_settings(settings):
    """Cut masters; short floats, in which the sums of losses are float32 all the same."""
    found, plain = engine_for(2, 2, **settings), engine_for(2, 2)
    short = "compute_dtype" in settings
    batch = batch_of(seed=3)
    for engine in (found, plain):
        engine.train_batch(iter(items_of(batch)))
    for name, value in plain.metrics.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=0.05 if short else 1e-5, err_msg=name)
        assert found.metrics[name].dtype == value.dtype
    if short:
        assert float(found.metrics["loss_scale"]) == 256
        _, grads = jaxpipe.reference.value_and_grad(
            plain.pipe.module, engine_for(2, 2).to_layers(), batch, num_data_ranks=2, compute_dtype="bfloat16"
        )
        np.testing.assert_allclose(found.grad_norm, optax.tree.norm(grads), rtol=0.05)


@pytest.mark.parametrize(("stages", "data"), [(1, 2), (2, 1), (4, 2)])
def test_evaluation(stages, data):
    """Its loss is that of `loss_fn` alone, and the extra losses are reported beside the metrics."""
    engine = engine_for(stages, data)
    layers, batch = jax.device_get(engine.to_layers()), batch_of(seed=5)
    items = items_of(batch)
    objective, wanted = by_hand(weighted_loss, layers, batch, data)
    loss = objective - sum(wanted[name] for name in ("balance", "z", "nothing"))
    found = engine.evaluate(items)
    assert found.keys() == {"loss", *wanted}
    for name, value in {"loss": loss, **wanted}.items():
        np.testing.assert_allclose(found[name], value, 1e-5, 1e-7, err_msg=name)
    for options in ({"bcast_loss": False}, {"return_logits": True}) if stages == 2 else ():
        *others, more = engine.eval_batch(iter(items), return_metrics=True, **options)
        np.testing.assert_allclose(others[0], loss, 1e-5, err_msg=str(options))
        assert more.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(more[name], value, 1e-5, 1e-7, err_msg=name)
    if stages == 2:
        unlabelled = [(x, None) for x, _ in items]
        logits, more = engine.eval_batch(iter(unlabelled), compute_loss=False, return_metrics=True)
        np.testing.assert_array_equal(logits, engine.eval_batch(iter(unlabelled), compute_loss=False))
        own = {name: value for name, value in wanted.items() if name not in ("worst", "close")}
        assert more.keys() == own.keys()
        for name, value in own.items():
            np.testing.assert_allclose(more[name], value, 1e-5, 1e-7, err_msg=name)


def test_ragged_evaluation():
    """What is linear in the rows is exact, whatever rows a micro-batch has."""
    engine = engine_for(2, 2)
    layers, (x, labels) = jax.device_get(engine.to_layers()), batch_of(seed=6, rows=6, count=4)
    rows = [6, 6, 5, 1]
    items = [jax.tree.map(lambda a, m=m, n=n: a[m][:n], (x, labels)) for m, n in enumerate(rows)]
    one_by_one = [run(layers, item[0]) for item in items]
    wanted = {
        "z": sum(n * (found[3][0]["z"] + found[7][0]["z"]) for n, (_, found) in zip(rows, one_by_one, strict=True)),
        "entropy": sum(
            n * sum(found[i][1]["entropy"] for i in (1, 2, 4, 5)) / 4
            for n, (_, found) in zip(rows, one_by_one, strict=True)
        ),
    }
    for found in (engine.evaluate(items), engine.eval_batch(iter(items), num_micro_batches=4, return_metrics=True)[1]):
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value / sum(rows), 1e-5, err_msg=name)


def test_a_model_without_loss_fn():
    def last(params, x):
        return jaxpipe.LayerOut((x @ params["w"]).mean(), {"z": 0.5 * (x**2).mean()})

    layers = [LAYERS[1], LAYERS[1], jaxpipe.Layer(block_init, last, "Last")]
    x = batch_of()[0]
    engine = jaxpipe.initialize(
        jaxpipe.PipelineModule(layers, partition_method="uniform"),
        optax.sgd(0.1),
        mesh=jaxpipe.make_mesh(pipe=2),
        example=(x[0], None),
        config={"num_micro_batches": M},
    )
    params = jax.device_get(engine.to_layers())

    def one(x):
        first = block(params[0], x)
        second = block(params[1], first.y)
        third = last(params[2], second.y)
        return third.y, first.losses["balance"] + second.losses["balance"], third.losses["z"]

    of_last, balance, extra = np.mean([one(each) for each in x], axis=0)
    found = engine.evaluate([(each, None) for each in x])
    np.testing.assert_allclose([found["loss"], found["balance"], found["z"]], [of_last, balance, extra], 1e-5)
    loss = engine.train_batch(iter([(each, None) for each in x]))
    np.testing.assert_allclose(loss, of_last + balance + extra, 1e-5)


def test_nothing_beside_costs_nothing():
    """A model whose layers give nothing beside is the same program as one of layers that cannot."""

    def text(*functions):
        layers = [jaxpipe.Layer(block_init, function, "Dense") for function in functions]
        module = jaxpipe.PipelineModule(layers, lambda y, t: (y * t).mean(), "uniform")
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=2), M)
        x = np.zeros((M, ROWS, WIDTH), np.float32)
        return pipe.lower_train(pipe.init(0, x[0]), (x, x)).as_text()

    def plain(params, x):
        return jnp.tanh(x @ params["w"])

    def wrapped(params, x):
        return jaxpipe.LayerOut(jnp.tanh(x @ params["w"]))

    assert text(plain, plain) == text(wrapped, wrapped)


def dense(params, x):
    return jnp.tanh(x @ params["w"])


def beside(losses=(), metrics=()):
    return jaxpipe.Layer(block_init, lambda p, x: jaxpipe.LayerOut(dense(p, x), dict(losses), dict(metrics)), "Beside")


REFUSED = {
    "reserved": ([beside({"loss": 1.0})], None, r"layer 0 \(Beside\).* the name 'loss'"),
    "reserved norm": ([beside((), {"grad_norm": 1.0})], None, "the name 'grad_norm'"),
    "reserved of loss_fn": ([], {"loss_scale": 1.0}, "loss_fn returned a metric of the name 'loss_scale'"),
    "loss and metric": ([beside({"a": 1.0}), beside((), {"a": 1.0})], None, "'a' stands for an extra loss"),
    "layer and loss_fn": ([beside((), {"a": 1.0})], {"a": 1.0}, "'a' stands for a metric of loss_fn"),
    "unlike rules": ([beside((), {"a": 1.0}), beside((), {"a": metrics.Sum(1.0)})], None, "by the rule Sum"),
    "unlike shapes": ([beside((), {"a": jnp.ones(2)}), beside((), {"a": jnp.ones(3)})], None, r"of float32\[3\]"),
}


@pytest.mark.parametrize(("layers", "found", "message"), REFUSED.values(), ids=REFUSED)
def test_a_name_means_one_thing(layers, found, message):
    x = np.zeros((ROWS, WIDTH), np.float32)
    layers = [*layers, jaxpipe.Layer(block_init, dense, "Dense"), jaxpipe.Layer(block_init, dense, "Dense")]
    module = jaxpipe.PipelineModule(layers, lambda y, t: (y.mean(), found or {}), "uniform")
    with pytest.raises(jaxpipe.errors.LossError, match=message):
        jaxpipe.initialize(module, optax.sgd(0.1), mesh=jaxpipe.make_mesh(pipe=2), example=(x, x))


def test_a_hand_written_loop_pays_for_no_metrics():
    """It gets loss and gradients only, so nothing of a metric is in its program, in which each metric is a cosine."""

    def layer(params, x):
        return jaxpipe.LayerOut(dense(params, x), {"a": (x**2).mean()}, {"b": jnp.cos(x).mean()})

    module = jaxpipe.PipelineModule(
        [jaxpipe.Layer(block_init, layer, "Dense")] * 4, lambda y, t: (y.mean(), {"c": jnp.cos(y).mean()}), "uniform"
    )
    x = np.zeros((M, ROWS, WIDTH), np.float32)
    settings = {"mesh": jaxpipe.make_mesh(pipe=2, data=2), "example": (x[0], x[0]), "config": {"num_micro_batches": M}}
    engine = jaxpipe.initialize(module, optax.sgd(0.1), **settings)
    text = engine.lower_train((x, x)).as_text()
    assert " cosine" in text or "cosine" in engine.lower_train((x, x)).compile().as_text()
    assert "cosine" not in engine.pipe.lower_train(engine.state.params, (x, x)).compile().as_text()
