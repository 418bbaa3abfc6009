"""What an iterator may yield: looked at by shapes, before anything goes to a device, with the path of the leaf."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.data import place as on_mesh
from jaxpipe.errors import ConfigError, DataError, LayerError, MeshError, ScheduleError

M, ROWS = 2, 4


def init(key, x):
    return {"w": jax.random.normal(key, (3, 3))}


LAYER = jaxpipe.Layer(init, lambda params, x: {**x, "h": x["h"] @ params["w"]}, "Dense")


def loss_fn(outputs, labels):
    return ((outputs["h"] - labels["t"]) ** 2).mean()


def item(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    h, t = rng.normal(size=(2, rows, 3)).astype(np.float32)
    return {"h": h}, {"t": t}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def make_engine(**changes):
    arguments = {"mesh": jaxpipe.make_mesh(pipe=2, data=2), "example": item(), "config": {"num_micro_batches": M}}
    module = jaxpipe.PipelineModule([LAYER, LAYER], loss_fn, partition_method="uniform")
    return jaxpipe.initialize(module, optax.sgd(0.1), **{**arguments, **changes})


def with_inputs(value):
    return {**item()[0], "more": value}, item()[1]


def with_labels(value):
    return item()[0], {"t": value}


MASKED = np.ma.masked_array(np.ones((ROWS, 3), np.float32), mask=np.eye(ROWS, 3))

# A micro-batch that is bad by itself: (what, the leaf and what is said of it).
BAD = {
    "labels of one row": (
        with_labels(item()[1]["t"][:1]),
        r"labels\['t'\] is float32\[1,3\] and has 1 rows, but inputs\['h'\]",
    ),
    "labels of half the rows": (
        with_labels(item()[1]["t"][:2]),
        r"labels\['t'\] is float32\[2,3\] and has 2 rows, but inputs",
    ),
    "inputs of other rows": (
        with_inputs(np.ones((2, 3))),
        r"inputs\['more'\] is float32\[2,3\] and has 2 rows, but inputs\['h'\]",
    ),
    "no rows": ((item(0)[0], item(0)[1]), r"inputs\['h'\] is float32\[0,3\]: its micro-batches have no rows"),
    "a scalar array": (with_inputs(np.float32(3)), r"inputs\['more'\] is float32\[\], which has no rows"),
    "a number": (with_inputs(3), r"inputs\['more'\] is 3, a single int, not an array.*np\.asarray"),
    "a list of numbers": (
        with_inputs([1, 2, 3, 4]),
        r"inputs\['more'\]\[0\] is 1, a single int, not an array.*np\.asarray",
    ),
    "lists as rows": (
        with_inputs([[1.0, 2.0]] * ROWS),
        r"inputs\['more'\]\[0\]\[0\] is 1\.0, a single float.*np\.asarray",
    ),
    "arrays as rows": (
        with_inputs([np.ones(3)] * ROWS),
        r"inputs\['more'\]\[0\] is float32\[3\] and has 3 rows.*np\.asarray",
    ),
    "a ragged list": (with_inputs([[1, 2], [3]]), r"inputs\['more'\]\[0\]\[0\] is 1, a single int"),
    "a ragged array": (
        with_inputs(np.array([[1, 2], [3]], object)),
        r"inputs\['more'\] is array.* Python objects.*padded",
    ),
    "text": (with_inputs("text"), r"inputs\['more'\] is 'text', a single str"),
    "an array of text": (
        with_inputs(np.array(list("abcd"))),
        r"inputs\['more'\] is an array of text \(<U1\).*tokenizer",
    ),
    "bytes": (with_inputs(np.array([b"a"] * ROWS)), r"inputs\['more'\] is an array of text \(\|S1\)"),
    "dates": (with_inputs(np.zeros(ROWS, "M8[s]")), r"inputs\['more'\] is an array of dtype datetime64\[s\]"),
    "records": (
        with_inputs(np.zeros(ROWS, [("a", "f4")])),
        r"inputs\['more'\] is an array of dtype .*, which JAX does not have",
    ),
    "a mask": (with_labels(MASKED), r"labels\['t'\] is a masked array, whose mask would be lost"),
    "an object": (with_inputs(object()), r"inputs\['more'\] is <object object.*Python objects"),
    "keys of two kinds": (with_inputs({1: np.ones(ROWS), "a": np.ones(ROWS)}), "keys of a dict cannot be sorted"),
    "no inputs": ((None, item()[1]), "inputs of the batch hold no array: None"),
    "a pair of three": ((*item(), 5), r"is a tuple of 3\. It yields pairs \(inputs, labels\)"),
    "a dict": ({"inputs": 1}, "is a dict. It yields pairs"),
}


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


# ------------------------------------------------------------------------------------------------- arguments of the makers


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"mesh": None}, MeshError, "mesh=None: expected a jax.sharding.Mesh, such as jaxpipe.make_mesh"),
        ({"mesh": 4}, MeshError, "mesh=4: expected"),
        ({"mesh": [0, 1]}, MeshError, r"mesh=\[0, 1\]: expected"),
        ({"example": None}, DataError, "example is one micro-batch: .* got a NoneType"),
        ({"example": 5}, DataError, "example is one micro-batch: .* got a int"),
        ({"example": item()[0]}, DataError, "example is one micro-batch: .* got a dict"),
        ({"config": 5}, ConfigError, "config is a int"),
        ({"config": "ds.json"}, ConfigError, "config is a str: .*from_deepspeed"),
        ({"config": {"num_micro_batches": np.int64(0)}}, ConfigError, "num_micro_batches=0 must be an integer"),
        ({"config": {"schedule": 5}}, ConfigError, "schedule=5 is a int"),
        ({"config": {"remat": print}}, ConfigError, "remat=.*builtin"),
        ({"config": {"num_micro_batches": 10**30}}, ScheduleError, "num_micro_batches=1000.*does not fit in memory"),
        ({"layers": 5}, LayerError, "layers is a int: expected a list"),
        ({"layers": {}}, LayerError, "layers is a dict: expected a list"),
        ({"layers": "ab"}, LayerError, "layers is a str: expected a list"),
        ({"layers": (None for _ in range(2))}, LayerError, "layers is a generator: expected a list"),
        ({"layers": [{}]}, LayerError, "1 per-layer params were given; the module has 2 layers"),
        ({"layers": [{"w": "x"}, {"w": "y"}]}, LayerError, r"layers\[0\]\['w'\] is 'x', a single str"),
        ({"layers": [{"w": np.ones((3, 3), object)}] * 2}, LayerError, r"layers\[0\]\['w'\] is .* Python objects"),
        ({"layers": [{"w": np.ones((3, 4), np.float32)}] * 2}, LayerError, "layer 0|float32"),
    ],
    ids=itertools.count(),
)
def test_arguments_of_initialize(changes, kind, message):
    with pytest.raises(kind, match=message):
        make_engine(**changes)


@pytest.mark.parametrize("module", [None, 5, [LAYER], LAYER, jaxpipe.PipelineModule, "module"], ids=itertools.count())
def test_what_is_no_module(module):
    mesh = jaxpipe.make_mesh(pipe=2)
    with pytest.raises(LayerError, match="expected a jaxpipe.PipelineModule. Write jaxpipe.PipelineModule"):
        jaxpipe.Pipeline(module, mesh)
    with pytest.raises(LayerError, match="expected a jaxpipe.PipelineModule"):
        jaxpipe.initialize(module, optax.sgd(0.1), mesh=mesh, example=item())


def test_numbers_of_other_libraries():
    mesh = jaxpipe.make_mesh(pipe=np.int64(2), data=jnp.int32(2), model=np.uint8(1))
    assert mesh.shape == {"pipe": 2, "data": 2, "model": 1} and {type(n) for n in mesh.shape.values()} == {int}
    module = jaxpipe.PipelineModule([LAYER, LAYER], loss_fn, partition_method="uniform")
    pipe = jaxpipe.Pipeline(module, mesh, num_micro_batches=np.int64(4), remat=np.int32(1))
    assert type(pipe.num_micro_batches) is int and type(pipe.remat) is int
    made = jaxpipe.schedules.one_f_one_b(np.int64(2), np.int8(3))
    assert made == jaxpipe.schedules.one_f_one_b(2, 3) and type(made.num_micro_batches) is int
    assert hash(jaxpipe.schedules.Op("F", np.int64(1), np.int64(2))) == hash(jaxpipe.schedules.Op("F", 1, 2))
    timeline = jaxpipe.schedules.simulate(made, np.float32(2), np.int64(1), jnp.float32(1), np.int8(0))
    assert float(timeline.makespan) == (3 + 1) * 4
    with pytest.raises(MeshError, match="model=True"):
        jaxpipe.make_mesh(model=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipe": 1.0}, "pipe=1.0"),
        ({"pipe": "2"}, "pipe='2'"),
        ({"data": np.bool_(True)}, "data="),
        ({"pipe": 10**50}, "needs 1000"),
        ({"devices": []}, r"needs 1 devices, but devices= holds 0"),
        ({"devices": 5}, r"devices=...\) holds 5: expected a sequence of devices"),
        ({"devices": "cpu"}, r"devices=...\) holds 'c'"),
        ({"devices": [0, 1]}, r"devices=...\) holds 0"),
        ({"pipe": 2, "devices": "twice"}, "holds a device twice"),
    ],
    ids=str,
)
def test_arguments_of_make_mesh(arguments, message):
    if arguments.get("devices") == "twice":
        arguments = {**arguments, "devices": [jax.devices()[0]] * 2}
    with pytest.raises(MeshError, match=message):
        jaxpipe.make_mesh(**arguments)


def test_devices_in_any_form():
    grid = np.asarray(jax.devices()[:4], dtype=object).reshape(2, 2)
    assert jaxpipe.make_mesh(2, 2, devices=grid) == jaxpipe.make_mesh(2, 2, devices=tuple(jax.devices()[:4]))


@pytest.mark.parametrize(
    "make", [jaxpipe.schedules.one_f_one_b, jaxpipe.schedules.forward_only, jaxpipe.schedules.gpipe]
)
def test_arguments_of_schedules(make):
    for bad in ("2", 0, -1, 2.0, np.float64(2), None, True, [2], 10**30):
        for arguments in ((bad, 3), (3, bad)):
            with pytest.raises(ScheduleError, match=r"num_(stages|micro_batches)="):
                make(*arguments)
    for call in (jaxpipe.schedules.simulate, lambda value: jaxpipe.schedules.draw(value, "x.json")):
        for value in (None, "1f1b", 5):
            with pytest.raises(ScheduleError, match="expected a Schedule"):
                call(value)
    for cost in ("1", None, True, float("nan"), -1, 10**400, 10**5000, 1j):
        with pytest.raises(ScheduleError, match="comm=.*a cost must be a finite number"):
            jaxpipe.schedules.simulate(make(2, 2), comm=cost)
    for rows in (None, 5, [5], [[5]], [["0F0"]]):
        with pytest.raises(ScheduleError):
            jaxpipe.schedules.Schedule(rows, [0])
