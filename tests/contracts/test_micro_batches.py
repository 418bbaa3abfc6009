"""What an iterator may yield: looked at by shapes, before anything goes to a device, with the path of the leaf."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.data import place as on_mesh
from jaxpipe.errors import DataError
from tests.data.micro_batches import BAD, item

M = 2


def init(key, x):
    return {"w": jax.random.normal(key, (3, 3))}


LAYER = jaxpipe.Layer(init, lambda params, x: {**x, "h": x["h"] @ params["w"]}, "Dense")


def loss_fn(outputs, labels):
    return ((outputs["h"] - labels["t"]) ** 2).mean()


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def make_engine(**changes):
    arguments = {"mesh": jaxpipe.make_mesh(pipe=2, data=2), "example": item(), "config": {"num_micro_batches": M}}
    module = jaxpipe.PipelineModule([LAYER, LAYER], loss_fn, partition_method="uniform")
    return jaxpipe.initialize(module, optax.sgd(0.1), **{**arguments, **changes})


@pytest.fixture
def nothing_moves(monkeypatch):
    """Fails if anything goes to a device."""
    monkeypatch.setattr(on_mesh, "stack", lambda *_: pytest.fail("data went to a device before it was looked at"))


@pytest.mark.parametrize("name", BAD)
def test_bad_micro_batches(engine, nothing_moves, name):
    bad, message = BAD[name]
    state, seen = engine.state, engine.micro_batches_seen
    for place in range(M):
        source = iter([item(), item(), item()][:place] + [bad] + [item(seed=9)] * 3)
        with pytest.raises(DataError, match=rf"(?s)^Micro-batch {place} of data_iter.*{message}") as caught:
            engine.train_batch(source)
        assert f"({place + 1} of {M} micro-batches were taken" in str(caught.value)
        assert len(list(source)) == 3, "no more was taken than is said"
    with pytest.raises(DataError, match=message):
        engine.eval_batch(iter([bad] * M))
    with pytest.raises(DataError, match=message):
        engine.evaluate([bad] * M, progress=False)
    if "labels" not in message:
        with pytest.raises(DataError, match=message):
            next(engine.predict([bad] * M))
    assert engine.state is state and engine.micro_batches_seen == seen


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("a pair of three", "a dict", "a number")])
def test_bad_examples(name):
    bad, message = BAD[name]
    with pytest.raises(DataError, match=message):
        make_engine(example=bad)


def test_three_rows_on_two_data_ranks(engine, nothing_moves):
    with pytest.raises(
        DataError, match=r"inputs\['h'\] is float32\[3,3\]: its 3 rows .* over 2 data ranks. Use a multiple"
    ):
        engine.train_batch(iter([item(3)] * M))
    with pytest.raises(DataError, match=r"The example: inputs\['h'\] is float32\[3,3\]: its 3 rows"):
        make_engine(example=item(3))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            lambda x, y: (x, {"u": y["t"]}),
            r"is (without labels\['t'\]; it has .*labels\['u'\]|float32\[4,3\] at labels\['u'\])",
        ),
        (
            lambda x, y: (x, {**y, "u": y["t"]}),
            r"is float32\[4,3\] at labels\['u'\], but micro-batch 0 is without labels\['u'\]",
        ),
        (lambda x, y: (x, None), r"is without labels\['t'\]"),
        (
            lambda x, y: (x, {"t": y["t"].astype(np.float16)}),
            r"is float16\[4,3\] at labels\['t'\], but micro-batch 0 is float32\[4,3\]",
        ),
        (
            lambda x, y: ({"h": x["h"][:, :2]}, y),
            r"is float32\[4,2\] at inputs\['h'\], but micro-batch 0 is float32\[4,3\] there",
        ),
        (lambda x, y: ({"h": x["h"], "n": ()}, y), "is .*'n'.*, but micro-batch 0 is "),
    ],
    ids=["key", "more", "none", "dtype", "width", "structure"],
)
def test_unlike_micro_batches_name_what_differs(engine, nothing_moves, odd, message):
    for call in (engine.train_batch, engine.eval_batch, lambda source: engine.evaluate(source, progress=False)):
        with pytest.raises(DataError, match=rf"^Micro-batch 1 of data_iter {message}"):
            call(iter([item(), odd(*item(seed=1)), item()]))


def test_unlike_rows(engine):
    with pytest.raises(
        DataError, match=r"Micro-batch 1 of data_iter is float32\[2,3\] at inputs.*, but micro-batch 0 is float32"
    ):
        engine.train_batch(iter([item(), item(2)]))
    assert np.isfinite(engine.eval_batch(iter([item(), item(3)])))


def test_iterators_that_fail_or_end(engine):
    class Mine(Exception):
        pass

    def fails():
        yield item()
        raise Mine("a broken file")

    state = engine.state
    for call in (engine.train_batch, engine.eval_batch, lambda source: engine.evaluate(source, progress=False)):
        with pytest.raises(Mine, match="^a broken file$"):
            call(fails())
    for call in (engine.train_batch, engine.eval_batch):
        with pytest.raises(DataError, match=f"data_iter ended after 1 of {M} micro-batches. Nothing was computed"):
            call(iter([item()]))
    for source in ([item()] * M, (item() for _ in ()).__iter__, 5, None):
        with pytest.raises(DataError, match="not an iterator"):
            engine.train_batch(source)
    assert engine.state is state


def test_what_is_as_good_as_an_array(engine):
    """Arrays on other devices, of other libraries, byte orders and kinds give what plain ones give."""
    expected = float(engine.eval_batch(iter([item(seed=1), item(seed=2)])))
    devices = jax.devices()
    variants = [
        lambda a, n: jax.device_put(a, devices[-1 - n]),
        lambda a, n: jnp.asarray(a) if n else a,
        lambda a, n: a if n else jax.device_put(a, devices[-1]),
        lambda a, n: a.astype(">f4"),
        lambda a, n: memoryview(np.ascontiguousarray(a)),
        lambda a, n: np.asfortranarray(a)[::1],
    ]
    for variant in variants:
        made = [jax.tree.map(lambda a, n=n, f=variant: f(a, n), item(seed=n + 1)) for n in range(M)]
        assert float(engine.eval_batch(iter(made))) == pytest.approx(expected, rel=1e-6)
        engine.train_batch(iter(made))
        engine.state = make_engine().state
    deleted = jax.tree.map(jnp.asarray, item())
    deleted[0]["h"].delete()
    with pytest.raises(DataError, match=r"inputs\['h'\] is an array that was deleted or donated"):
        engine.train_batch(iter([deleted] * M))


def stacked(*items):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def test_batches_of_the_functional_core(engine):
    pipe, params = engine.pipe, engine.state.params
    inputs, labels = stacked(item(), item(seed=1))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (inputs, labels))
    bad = {
        r"labels\['t'\] is float32\[2,1,3\] and has 1 rows": (inputs, {"t": labels["t"][:, :1]}),
        r"labels\['t'\] is float32\[2,2,3\] and has 2 rows": (
            abstract[0],
            {"t": jax.ShapeDtypeStruct((2, 2, 3), np.float32)},
        ),
        r"inputs\['h'\] is an array of dtype >f4, in the byte order": ({"h": inputs["h"].astype(">f4")}, labels),
        r"inputs\['h'\]\[0\]\[0\]\[0\] is .*, a single float": ({"h": inputs["h"].tolist()}, labels),
        r"labels\['t'\] is array.*Python objects": (inputs, {"t": labels["t"].astype(object)}),
    }
    for message, batch in bad.items():
        for call in (pipe.value_and_grad, pipe.evaluate, pipe.lower_train, pipe.lower_eval):
            with pytest.raises(DataError, match=message):
                call(params, batch)
    pipe.evaluate(params, (inputs, {"t": labels["t"][:, :1]}), compute_loss=False)  # labels are not looked at
    with pytest.raises(DataError, match=re.escape("The example: inputs[1] is float32[2,3] and has 2 rows")):
        pipe.init(jax.random.key(0), (np.ones((4, 3), np.float32), np.ones((2, 3), np.float32)))
