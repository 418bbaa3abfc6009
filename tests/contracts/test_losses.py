"""Weighted losses and backward passes that are not linear, against the whole batch at once in plain JAX or NumPy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import DataError, LossError
from tests.compare import assert_close

M, ROWS, WIDTH = 3, 6, 4


@jax.custom_vjp
def bent(x):
    return x


# The gradient is squeezed: twice the cotangent does not give twice the gradient.
bent.defvjp(lambda x: (x, None), lambda _, g: (0.02 * jnp.tanh(50 * g),))


def dense(params, x):
    return bent(jnp.tanh(x @ params["w"]))


def dense_init(key, x):
    return {"w": jax.random.normal(key, (WIDTH, WIDTH), jnp.zeros(()).dtype)}


def head(params, x):
    return bent(x) @ params["w"]


DENSE, HEAD = jaxpipe.Layer(dense_init, dense, "Dense"), jaxpipe.Layer(dense_init, head, "Head")


def mean_loss(y, labels):
    return ((y - labels["t"]) ** 2).mean()


def weighted_loss(y, labels):
    each = ((y - labels["t"]) ** 2).mean(-1)
    return jaxpipe.Weighted((labels["w"] * each).sum(), labels["w"].sum()), {"largest": jaxpipe.metrics.Max(each.max())}


def batch_of(weights, rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=(2, len(weights), rows, WIDTH)).astype(jnp.zeros(()).dtype)
    return x, {"t": t, "w": np.asarray(weights, x.dtype)}


def weights_of(rows=ROWS):
    """[M, rows] weights by name; with two or three data ranks some of them lie on one rank, or cancel between ranks."""
    rng = np.random.default_rng(7)
    tables = {"uneven": rng.uniform(0.1, 3, (M, rows))}
    tables["counts"] = rng.integers(0, 2, (M, rows)) + (np.arange(rows) == 0)
    tables["negative"] = -tables["uneven"]
    tables["one micro-batch of no weight"] = tables["uneven"] * np.array([[1], [0], [2]])
    tables["one negative micro-batch"] = tables["uneven"] * np.array([[1], [-0.5], [2]])
    tables["one rank of no weight"] = np.where(np.arange(rows) < rows // 2, 0, tables["uneven"])
    cancelling = np.zeros((M, rows))
    cancelling[:, 0], cancelling[:, -1] = 2, -2
    tables["micro-batches that cancel"] = cancelling + np.array([[0], [0], [1]])
    tables["all cancel"], tables["all zero"] = cancelling, np.zeros((M, rows))
    return tables


def whole(loss_fn, layers, batch):
    """The loss of all rows in one call, in plain JAX."""
    x, labels = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
    for layer in layers[:-1]:
        x = dense(layer, x)
    result = loss_fn(head(layers[-1], x), labels)
    if loss_fn is mean_loss:
        return result
    total, weight = result[0].total, result[0].weight
    return jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight))


@pytest.mark.parametrize(("stages", "data"), [(1, 1), (2, 3), (4, 2)])
def test_gradients_are_those_of_the_whole_batch(stages, data):
    """A backward pass starts from the gradient of the mean, whatever the mean is over. In 64 bits, so rounding is small."""
    with jax.enable_x64(True):
        check_gradients(stages, data)


def check_gradients(stages, data):
    grad = jax.jit(jax.value_and_grad(whole, argnums=1), static_argnums=0)
    for loss_fn in (mean_loss, weighted_loss):
        module = jaxpipe.PipelineModule([*[DENSE] * 4, HEAD], loss_fn, "uniform")
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages, data=data), M, poison=True)
        params = pipe.init(jax.random.key(0), np.zeros((ROWS, WIDTH)))
        layers = jax.device_get(pipe.to_layers(params))
        for name, weights in weights_of().items() if loss_fn is weighted_loss else [("mean", np.ones((M, ROWS)))]:
            batch = batch_of(weights)
            wanted = jax.device_get(grad(loss_fn, layers, batch))
            loss, grads = pipe.value_and_grad(params, batch)
            assert_close((loss, pipe.to_layers(grads)), wanted, 1e-12, name)
            found = jaxpipe.reference.value_and_grad(module, layers, batch, num_data_ranks=data)
            assert_close(jax.device_get(found), wanted, 1e-12, f"{name}, reference")
            nothing = name in ("all cancel", "all zero")
            assert (float(loss) == 0) is nothing
            assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted)) is not nothing


def test_nothing_counts_and_nothing_is_finite():
    """0 x infinity is not a number, but where the weight is 0 there is no loss and no gradient."""
    engine = engine_for(weighted_loss, stages=2, data=2)
    x, labels = batch_of(np.zeros((M, ROWS)))
    labels["t"] = np.full_like(labels["t"], np.inf)
    items = list(
        zip(x, [dict(zip(labels, each, strict=True)) for each in zip(*labels.values(), strict=True)], strict=True)
    )
    before = jax.device_get(engine.to_layers())
    assert float(engine.train_batch(iter(items))) == 0 and float(engine.grad_norm) == 0
    engine.train_batch(iter(items))  # raises if the step before was not finite
    assert_close(engine.to_layers(), before, 0)
    for reduce_output in ("avg", "sum", None):
        assert not np.asarray(engine.eval_batch(iter(items), reduce_output=reduce_output)).any()
    found = jaxpipe.reference.value_and_grad(engine.pipe.module, before, (x, labels))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found))


def engine_for(loss_fn, stages, data, example_rows=ROWS):
    x, labels = batch_of(np.ones((1, example_rows)), example_rows)
    return jaxpipe.initialize(
        jaxpipe.PipelineModule([DENSE, DENSE, HEAD], loss_fn, "uniform"),
        optax.sgd(0.1),
        mesh=jaxpipe.make_mesh(pipe=stages, data=data),
        example=(x[0], {name: a[0] for name, a in labels.items()}),
        config={"num_micro_batches": M},
        key=jax.random.key(1),
    )


def per_row(layers, x, t):
    """The loss of each row, in NumPy and float64."""
    layers = [np.asarray(layer["w"], np.float64) for layer in layers]
    x = np.tanh(np.tanh(x @ layers[0]) @ layers[1]) @ layers[2]
    return ((x - t) ** 2).mean(-1)


def by_hand(layers, items):
    """(loss per reduction, the largest loss of a row) of micro-batches, from the rule as it is written down."""
    rows = [per_row(layers, x, labels["t"]) for x, labels in items]
    totals = [float((each * labels["w"]).sum()) for each, (_, labels) in zip(rows, items, strict=True)]
    weights = [float(labels["w"].astype(np.float64).sum()) for _, labels in items]
    each = [total / weight if weight else 0.0 for total, weight in zip(totals, weights, strict=True)]
    average = sum(totals) / sum(weights) if sum(weights) else 0.0
    return {"avg": average, "sum": sum(each), None: np.array(each)}, max(map(np.max, rows))


@pytest.mark.parametrize(("data", "rows"), [(1, (6, 6, 6)), (2, (6, 6, 6)), (1, (6, 6, 5)), (3, (6, 6, 5))], ids=str)
def test_evaluation_follows_one_rule(data, rows):
    """Every reduction, on all ranks and on the last one, with rows that divide over the data ranks and that do not."""
    engine = engine_for(weighted_loss, 2, data)
    layers = jax.device_get(engine.to_layers())
    for name, weights in weights_of(max(rows)).items():
        x, labels = batch_of(weights, max(rows))
        items = [(a[:n], {"t": t[:n], "w": w[:n]}) for a, t, w, n in zip(x, *labels.values(), rows, strict=True)]
        if name == "all cancel" and rows[-1] < ROWS:
            items[-1][1]["w"][0] = 0
        wanted, largest = by_hand(layers, items)
        for reduce_output, broadcast in itertools.product(wanted, (True, False)):
            found, metrics = engine.eval_batch(
                iter(items), reduce_output=reduce_output, bcast_loss=broadcast, return_metrics=True
            )
            what = f"{name}, {reduce_output}, broadcast {broadcast}"
            np.testing.assert_allclose(found, wanted[reduce_output], 2e-5, 1e-6, err_msg=what)
            np.testing.assert_allclose(metrics["largest"], largest, 1e-6, err_msg=what)
        if wanted["avg"] == 0:
            with pytest.raises(DataError, match="The weights that loss_fn returns add up to 0 over all of the data"):
                engine.evaluate(items)
        else:
            found = engine.evaluate(items[:2] + items)  # two batches, of which the last is not full
            wanted, _ = by_hand(layers, items[:2] + items)
            np.testing.assert_allclose(found["loss"], wanted["avg"], 2e-5, err_msg=name)


def test_refused_before_anything_runs():
    def pair(y, labels):
        return ((y - labels["t"]) ** 2).mean(), (jnp.abs(y - labels["t"]) < 1).mean()

    def dependent(y, labels):
        return jaxpipe.Weighted((y * labels["w"][:, None]).sum(), jnp.abs(y).sum())

    for loss_fn, message in ((pair, "a pair of scalars, which is ambiguous"), (dependent, "depends on the outputs")):
        with pytest.raises(LossError, match=message):
            engine_for(loss_fn, 2, 1)
        module = jaxpipe.PipelineModule([DENSE, DENSE, HEAD], loss_fn, "uniform")
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), M)
        params = pipe.init(jax.random.key(0), np.zeros((ROWS, WIDTH), np.float32))
        for call in (pipe.value_and_grad, pipe.evaluate):
            with pytest.raises(LossError, match=message):
                call(params, batch_of(np.ones((M, ROWS))))


@dataclasses.dataclass(frozen=True)
class Scale:
    """Equal to every other one, and yet another function."""

    by: float = dataclasses.field(compare=False)

    def __call__(self, x):
        return x * self.by


def test_the_oracle_calls_every_entry_by_itself():
    batch = batch_of(np.ones((M, ROWS)))
    scales = [2.0, 0.5, -3.0]
    module = jaxpipe.PipelineModule([DENSE, *map(Scale, scales), HEAD], mean_loss)
    layers = [dense_init(jax.random.key(0), None), {}, {}, {}, dense_init(jax.random.key(1), None)]

    def plain(layers):
        x, labels = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
        return mean_loss(head(layers[-1], np.prod(scales).astype(np.float32) * dense(layers[0], x)), labels)

    assert_close(jaxpipe.reference.value_and_grad(module, layers, batch), jax.value_and_grad(plain)(layers), 1e-6)
    # 600 parts of bfloat16 gradients: added up in bfloat16 they would stop growing.
    table = jaxpipe.Layer(lambda key, x: {}, lambda p, ids: p["t"][ids], "Table")
    module = jaxpipe.PipelineModule([table], lambda y, t: y.mean())
    ids = np.zeros((600, 2, 3), np.int32)
    loss, grads = jaxpipe.reference.value_and_grad(module, [{"t": jnp.ones((5, 4), jnp.bfloat16)}], (ids, None))
    assert float(loss) == 1 and grads[0]["t"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grads[0]["t"][0], np.float32), 0.25, rtol=1e-2)
