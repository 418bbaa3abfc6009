"""Metrics, micro-batches of unlike size, and whole data sets: exact against one device that sees all rows."""

import functools
import io
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe import metrics as rules
from jaxpipe.errors import ConfigError, DataError, LossError
from jaxpipe.evaluation import dataset
from jaxpipe.executor.reference import forward
from jaxpipe.monitor import progress
from tests.compare import assert_close
from tests.models import VOCAB, WIDTH, Block, Embedding, cross_entropy, make_batch, masked_cross_entropy, tied, untied


def measured(logits, labels):
    """A metric of every rule; values of other shapes than scalars, integers and booleans among them."""
    hit = logits.argmax(-1) == labels
    mask = labels >= 3
    wide = jnp.where(mask, 1.0, 0.0).astype(logits.dtype)
    return {
        "accuracy": hit.mean(),
        "column": rules.Mean(logits.mean((0, 1))),
        "masked": (jnp.where(hit, wide, 0).sum(), wide.sum()),
        "hits": rules.Sum(jnp.zeros(VOCAB, jnp.int32).at[labels].add(hit.astype(jnp.int32))),
        "largest": rules.Max(logits.max()),
        "smallest": rules.Min(logits.min((0, 1))),
        "last_label": rules.Max(labels.max()),
        "first_label": rules.Min(labels.min().astype(jnp.uint8)),
        "every_row_hits": rules.Min((~hit).any(-1).all()),
        "guess": rules.Concat(logits.argmax(-1)),
    }


def mean_with_metrics(logits, labels):
    return cross_entropy(logits, labels), measured(logits, labels)


def masked_with_metrics(logits, labels):
    return {"loss": masked_cross_entropy(logits, labels), **measured(logits, labels)}


def without_rows(loss_fn):
    """Values per row keep the loss on the last rank; without them all ranks may share it."""

    def smaller(logits, labels):
        loss, found = loss_fn(logits, labels)
        return loss, {name: value for name, value in found.items() if name != "guess"}

    return smaller


@functools.cache
def compiled(module):
    return jax.jit(lambda layers, x: forward(module, layers, x))


def oracle(module, layers, items):
    """(loss, metrics, outputs per item) of all rows at once, on one device. A plain mean over rows of equal length."""
    layers = jax.device_put(jax.device_get(layers), jax.devices()[0])
    outputs = [np.asarray(compiled(module)(layers, x)) for x, _ in items]
    logits, labels = np.concatenate(outputs), np.concatenate([y for _, y in items])
    result = module.loss_fn(logits, labels)
    if isinstance(result, dict):
        loss, found = result["loss"], {name: value for name, value in result.items() if name != "loss"}
    else:
        loss, found = result
    loss = loss.total / loss.weight if isinstance(loss, jaxpipe.Weighted) else loss
    finished = {}
    for name, metric in rules.as_metrics(found).items():
        finished[name] = jnp.asarray(metric.finish(metric.terms(len(logits))))
    return loss, finished, outputs


def items_of(rows, length=5):
    """Micro-batches with these numbers of rows, all different."""
    return [tuple(a[0] for a in make_batch(1, count, length, seed=seed)) for seed, count in enumerate(rows)]


def pipeline(module, stages, data):
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages, data=data), num_micro_batches=3)
    return pipe, pipe.init(jax.random.key(2), make_batch(1)[0][0])


@pytest.mark.parametrize(
    ("make", "stages", "data", "micro_batches"),
    [(tied, 4, 2, 6), (untied, 3, 1, 4), (tied, 1, 2, 3)],
)
def test_metrics_and_shared_work(make, stages, data, micro_batches):
    """Every rule, on all ranks and on the last one; the work of tail and loss on the last rank, or on all in turn."""
    loss_fn = mean_with_metrics if make is tied else lambda y, t: (masked_cross_entropy(y, t), measured(y, t))
    items = items_of([4] * micro_batches)
    batch = tuple(np.stack(leaves) for leaves in zip(*items, strict=True))
    pipe, params = pipeline(make(loss=loss_fn), stages, data)
    loss, found, outputs = oracle(pipe.module, pipe.to_layers(params), items)
    for broadcast in (True, False):
        got = pipe.evaluate(params, batch, return_metrics=True, bcast_loss=broadcast)
        assert_close(got, (loss, found), 1e-6, f"broadcast {broadcast}")
    got = pipe.evaluate(params, batch, True, return_metrics=True, reduce_output=None)
    assert_close(got[1:], (np.stack(outputs), found), 1e-6)
    assert got[0].shape == (micro_batches,)

    module = make(loss=without_rows(loss_fn))
    smaller, _ = pipeline(module, stages, data)
    del found["guess"]
    for spread in (True, False):
        got = smaller.evaluate(params, batch, return_metrics=True, spread_loss=spread)
        assert_close(got, (loss, found), 1e-6, f"spread {spread}")
        each = smaller.evaluate(params, batch, reduce_output=None, spread_loss=spread)
        assert_close(each, pipe.evaluate(params, batch, reduce_output=None), 1e-6)


@functools.cache
def on_three_data_ranks(loss_fn):
    mesh = jaxpipe.make_mesh(pipe=2, data=3)
    return jaxpipe.initialize(tied(loss=loss_fn), optax.sgd(0.1), mesh=mesh, example=items_of([3])[0])


@pytest.mark.parametrize(
    ("loss_fn", "rows"),
    [
        (mean_with_metrics, [4, 4, 3]),
        (masked_with_metrics, [5, 5]),
        (mean_with_metrics, [1]),
        (masked_with_metrics, [7, 1]),
    ],
)
def test_unlike_rows_are_exact(loss_fn, rows):
    """Three data ranks: rows that do not divide, fewer rows than ranks, sizes that change in the middle."""
    items, engine = items_of(rows), on_three_data_ranks(loss_fn)
    module = engine.pipe.module
    loss, found, outputs = oracle(module, engine.to_layers(), items)

    def call(**options):
        return engine.eval_batch(iter(items), num_micro_batches=len(rows), **options)

    assert_close(call(return_metrics=True, bcast_loss=len(rows) == 2), (loss, found), 1e-6)
    each = [oracle(module, engine.to_layers(), [item])[0] for item in items]
    assert_close(call(reduce_output=None), np.asarray(each), 1e-6)
    assert_close(call(reduce_output="sum"), np.sum(each, dtype=np.float32), 1e-6)
    logits = call(compute_loss=False)
    assert logits.shape[:2] == (len(rows), max(rows))
    for m, count in enumerate(rows):
        assert_close(logits[m, :count], outputs[m], 1e-6)
        assert not np.asarray(logits[m, count:]).any(), "rows that do not exist"
    if len(set(rows)) == 1:
        batch = tuple(np.stack(leaves) for leaves in zip(*items, strict=True))
        assert_close(engine.pipe.evaluate(engine.state.params, batch), loss, 1e-6)


@pytest.fixture(scope="module")
def engine():
    return jaxpipe.initialize(
        tied(loss=without_rows(mean_with_metrics)),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=4, data=2),
        example=items_of([4])[0],
        config={"num_micro_batches": 3},
        key=jax.random.key(3),
    )


def more(logits, labels):
    return {"mean_label": labels.astype(logits.dtype).mean(), "guess": rules.Concat(logits.argmax(-1))}


def test_a_whole_data_set(engine, no_compiles):
    """Two full batches, a short one with a last micro-batch that does not divide; twice; training goes on in between."""
    items = items_of([4] * 7 + [3])
    loss, found, outputs = oracle(engine.pipe.module, engine.to_layers(), items)
    labels = np.concatenate([y for _, y in items])
    wanted = {"loss": loss, **found, "mean_label": labels.mean(), "guess": np.concatenate(outputs).argmax(-1)}
    got = engine.evaluate(iter(items), metrics=more)
    assert all(isinstance(got[name], float) for name in ("loss", "accuracy", "mean_label", "largest"))
    assert type(got["last_label"]) is int and got["hits"].tolist() == found["hits"].tolist()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-6 * np.abs(value).max(), err_msg=name)
    with no_compiles():
        assert str(engine.evaluate(items, metrics=more)) == str(got)
    engine.train_batch(iter(items[:3]))
    assert engine.evaluate(items, metrics=more)["loss"] != got["loss"]

    part = engine.evaluate(items, num_batches=2)
    assert_close(part["loss"], float(oracle(engine.pipe.module, engine.to_layers(), items[:6])[0]), 1e-6)
    for made, given in itertools.zip_longest(
        engine.predict(iter(items)), [items[:3], items[3:6], [items[6]], [items[7]]]
    ):
        wanted = oracle(engine.pipe.module, engine.to_layers(), given)[2]
        assert_close(made, np.stack(wanted), 1e-6)


def test_the_next_batch_is_under_way_before_a_result_is_read(engine, monkeypatch):
    events = []
    run, get = engine.pipe.evaluator.run, jax.device_get
    monkeypatch.setattr(engine.pipe.evaluator, "run", lambda *args: events.append("run") or run(*args))
    monkeypatch.setattr(dataset.jax, "device_get", lambda tree: events.append("get") or get(tree))
    engine.evaluate(items_of([4] * 15))
    assert events == ["run", "run", "run", "get", "run", "get", "run", "get", "get", "get"]
    events.clear()
    next(engine.predict(items_of([4] * 15)))
    assert events == ["run", "run"]


def test_short_integers_are_summed_in_long_ones(engine):
    def metrics(logits, labels):
        return {"signed": rules.Sum(jnp.full((), -100, jnp.int8)), "unsigned": rules.Sum(jnp.full((), 200, jnp.uint8))}

    found = engine.evaluate(items_of([4] * 3), metrics=metrics)
    assert (found["signed"], found["unsigned"]) == (-600, 1200)  # once per micro-batch and data rank


class WithoutLength(list):
    def __len__(self):
        raise TypeError("an endless data set has no length")


def test_loaders_and_labels_of_any_kind(engine):
    """A loader whose length is a TypeError; labels that no program could take, where none are wanted; data that fails."""
    items = items_of([4] * 6)
    assert str(engine.evaluate(WithoutLength(items))) == str(engine.evaluate(items))
    odd = [(x, np.array(["label"] * (i + 1))) for i, (x, _) in enumerate(items)]
    for found, wanted in itertools.zip_longest(engine.predict(odd), engine.predict(items)):
        assert_close(found, np.asarray(wanted), 0)
    engine.eval_batch(iter(odd), compute_loss=False)

    def failing():
        yield from items
        raise OSError("disk gone")

    found = []
    with pytest.raises(OSError, match="disk gone"):
        found.extend(engine.predict(failing()))
    assert len(found) == 2, "what was computed before comes first"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar(engine, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(progress.sys, "stdout", out)
    engine.evaluate(items_of([4] * 6))
    assert re.search(r"batch 2/2  loss \d", out.getvalue())
    engine.evaluate(iter(items_of([4] * 6)))
    assert re.search(r"batch 2  loss \d", out.getvalue())
    shown = out.getvalue()
    engine.evaluate(items_of([4] * 3), progress=False)
    assert out.getvalue() == shown


def test_outputs_may_be_trees_and_no_loss_is_needed():
    def head(x):
        return {"a": x[..., :2], "b": (x.sum((1, 2)), None, x.argmax(-1))}

    layers = [jaxpipe.LayerSpec(Embedding), *[jaxpipe.LayerSpec(Block, WIDTH)] * 3, head]
    module = jaxpipe.PipelineModule(layers)
    engine = jaxpipe.initialize(
        module, optax.sgd(0.1), mesh=jaxpipe.make_mesh(pipe=2, data=2), example=(items_of([4])[0][0], None)
    )
    items = items_of([4, 4, 1])
    run = jax.jit(lambda x: forward(module, jax.device_get(engine.to_layers()), x))
    wanted = [run(x) for x, _ in items]
    unlabeled = [(x, None) for x, _ in items]
    got = engine.eval_batch(iter(unlabeled), compute_loss=False, num_micro_batches=3)
    for m, rows in enumerate((4, 4, 1)):
        assert_close(jax.tree.map(lambda a, m=m, rows=rows: a[m, :rows], got), jax.device_get(wanted[m]), 1e-6)
    found = engine.evaluate(items, metrics=lambda y, t: {"ids": (y["b"][0] + t.sum(1).astype(y["b"][0].dtype)).mean()})
    ids = np.concatenate([np.asarray(y["b"][0]) + t.sum(1) for y, (_, t) in zip(wanted, items, strict=True)])
    assert found.keys() == {"ids"}
    assert_close(found["ids"], float(ids.mean()), 1e-6)


def test_arguments_are_checked(engine):
    items = items_of([4])
    with pytest.raises(DataError, match="nothing to evaluate"):
        engine.evaluate([])
    with pytest.raises(DataError, match="num_batches=0"):
        engine.evaluate(items, num_batches=0)
    with pytest.raises(DataError, match="num_batches='3'"):
        engine.evaluate(items, num_batches="3")
    for options in ({"spread_loss": "yes"}, {"spread_loss": True, "bcast_loss": False}):
        with pytest.raises(ConfigError, match="spread_loss="):
            engine.pipe.evaluate(engine.state.params, make_batch(3), **options)
    with pytest.raises(DataError, match="its micro-batches have no rows"):
        engine.evaluate([tuple(a[:0] for a in items[0])])
    with pytest.raises(DataError, match="data_iter is a int"):
        engine.predict(3)
    with pytest.raises(DataError, match="may differ in the number of rows, their first dim, and in nothing else"):
        engine.evaluate([items[0], items_of([4], length=3)[0]])
    with pytest.raises(ConfigError, match="return_metrics=True needs compute_loss=True here: no layer"):
        engine.eval_batch(iter(items), compute_loss=False, return_metrics=True, num_micro_batches=1)
    with pytest.raises(LossError, match=r"metrics \['accuracy'\] come from both"):
        engine.evaluate(items, metrics=lambda y, t: {"accuracy": y.mean()})
    with pytest.raises(LossError, match='cannot be named "loss"'):
        engine.evaluate(items, metrics=lambda y, t: {"loss": y.mean()})
    with pytest.raises(LossError, match=r"Concat holds float32\[5,11\], but its leading dim must be the rows .*\(2 on"):
        engine.evaluate(items, metrics=lambda y, t: {"x": rules.Concat(y.mean(0))})
    with pytest.raises(LossError, match="The metric 'x' is a str"):
        engine.evaluate(items, metrics=lambda y, t: {"x": "high"})
