"""`generate`: token by token what one device makes of whole sequences, for any cut, mesh, number of rows and rules."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.data import shapes_seen
from jaxpipe.errors import ConfigError, DataError, LayerError
from jaxpipe.executor.generate_plan import Request
from jaxpipe.executor.sampling import Sampling
from tests.generation import ATTENTION, EMBED, HEAD, MOST, SCALE, VOCAB, WIDTH, attention, by_hand, causal, prompts


def pipeline(module, stages=1, data=1, axes=None, **settings):
    mesh = jaxpipe.make_mesh(pipe=stages, data=data, **(axes or {}))
    pipe = jaxpipe.Pipeline(module, mesh, poison=True, **settings)
    return pipe, pipe.init(3, prompts(1))


CASES = [  # stages, data ranks, rows, tokens of a prompt, new ones, cut, settings
    (1, 1, 3, 4, 6, "uniform", {}),
    (2, 2, 5, 4, 6, [0, 5, 7], {}),  # the second stage has one cache, the first one two
    (4, 1, 2, 3, 5, [0, 1, 2, 3, 7], {}),  # fewer rows than ranks, one layer per stage
    (4, 2, 9, 5, 1, "uniform", {"zero_stage": 1}),  # one token: no turn behind the prompts
    (2, 2, 7, 1, 6, [0, 2, 7], {"zero_stage": 1, "compute_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("stages", "data", "rows", "length", "new", "cut", "settings"), CASES)
def test_tokens_are_those_of_one_device(stages, data, rows, length, new, cut, settings):
    module = causal(cut)
    pipe, params = pipeline(module, stages, data, **settings)
    ids = prompts(rows, length)
    tokens = pipe.generate(params, ids, new)
    assert tokens.shape == (rows, length + new) and tokens.dtype == jnp.int32 and tokens.is_fully_replicated
    wanted = by_hand(module, pipe.to_layers(params), ids, new, compute_dtype=settings.get("compute_dtype"))
    np.testing.assert_array_equal(tokens, wanted)


def test_a_further_axis_and_tied_weights():
    rules = [("qkv", P(None, "model")), ("out", P("model", None)), ("mlp", P(None, "model"))]
    embedding = jaxpipe.Layer(lambda key, x: jax.random.normal(key, (VOCAB, WIDTH)), lambda table, ids: table[ids])

    def table():
        return embedding

    ends = [
        jaxpipe.TiedLayerSpec("embedding", table),
        jaxpipe.TiedLayerSpec("embedding", table, forward_fn=lambda table, x: x @ table.T),
    ]
    module = jaxpipe.PipelineModule([ends[0], *[ATTENTION] * 3, ends[1]], sharding=rules, partition_method=[0, 2, 5])
    pipe, params = pipeline(module, 2, 1, {"model": 2})
    ids = prompts(3)
    wanted = by_hand(module, pipe.to_layers(params), ids, 5)
    np.testing.assert_array_equal(pipe.generate(params, ids, 5), wanted)


def drawn(key, temperature, top_k, rows=None):
    """The rule of the documentation, written once more: one row after the other; `rows`: their numbers, from 0 if None."""

    def choose(logits, number):
        tokens = []
        for index, own in enumerate(np.asarray(logits) / np.float32(temperature)):
            row = index if rows is None else rows[index]
            order = np.argsort(-own, kind="stable")[:top_k] if top_k else np.arange(len(own))
            noise = jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), number), (len(order),))
            tokens.append(order[np.argmax(own[order] + noise)])
        return np.stack(tokens)

    return choose


@pytest.mark.parametrize(("stages", "data", "top_k", "stop"), [(2, 2, 4, None), (4, 1, None, 9)])
def test_what_is_drawn_depends_on_key_row_and_number_alone(stages, data, top_k, stop):
    module = causal()
    pipe, params = pipeline(module, stages, data)
    ids, key = prompts(5), jax.random.key(8)
    tokens = pipe.generate(params, ids, 6, temperature=2.5, top_k=top_k, stop=stop, key=key)
    wanted = by_hand(module, pipe.to_layers(params), ids, 6, drawn(key, 2.5, top_k), stop)
    np.testing.assert_array_equal(tokens, wanted)
    if stop is not None:
        assert (wanted[:, 4:] == stop).any(axis=1).tolist().count(True) in range(1, 5), "some rows stop, and not all"


@pytest.mark.parametrize("cached", [True, False])
def test_prompts_of_unlike_lengths(cached, monkeypatch):
    """A row is what it is among others of its length: its noise is that of its number among all prompts of the call."""
    layers = causal().entries if cached else [EMBED, mixer(mean_of_before), HEAD]
    module = jaxpipe.PipelineModule(list(layers), partition_method="uniform")
    pipe, params = pipeline(module, 2, 2)
    ids, key = prompts(6), jax.random.key(8)
    given = [list(row[: 4 if number % 3 else 2]) for number, row in enumerate(ids)]
    if cached:
        monkeypatch.setattr(shapes_seen, "MOST", 1)
    with pytest.warns(UserWarning, match="2 shapes of prompt batches so far" if cached else "has no cache"):
        found = pipe.generate(params, given, 3, temperature=2.5, top_k=4, stop=9, key=key)
    assert [len(row) for row in found] == [5, 7, 7, 5, 7, 7]
    for length, numbers in ((2, [0, 3]), (4, [1, 2, 4, 5])):
        choose = drawn(key, 2.5, 4, numbers)
        wanted = by_hand(module, pipe.to_layers(params), ids[numbers, :length], 3, choose, 9)
        np.testing.assert_array_equal(np.stack([found[number] for number in numbers]), wanted)


def test_the_second_call_compiles_nothing_and_another_key_draws_others(no_compiles):
    pipe, params = pipeline(causal(), 2)
    first = np.asarray(pipe.generate(params, prompts(4), 5, temperature=99.0, key=1))
    with no_compiles():
        again = np.asarray(pipe.generate(params, prompts(4), 5, temperature=99.0, key=1))
        other = np.asarray(pipe.generate(params, prompts(4), 5, temperature=99.0, key=2))
        colder = np.asarray(pipe.generate(params, prompts(4), 5, temperature=0.5, key=1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != colder).any()


def test_it_ends_when_every_row_has_stopped():
    """Behind the stop token nothing is run: the layer that draws its own token always says so once more."""
    runs = []

    def head(params, x):
        jax.debug.callback(lambda: runs.append(1))
        return jnp.broadcast_to(jax.nn.one_hot(7, VOCAB), (*x.shape[:2], VOCAB))

    layers = [EMBED, ATTENTION, jaxpipe.Layer(lambda key, x: {}, head, "Head")]
    pipe, params = pipeline(jaxpipe.PipelineModule(layers, partition_method="uniform"), 2)
    tokens = pipe.generate(params, prompts(2), 8, stop=7)
    assert (np.asarray(tokens)[:, 4:] == 7).all()
    jax.effects_barrier()
    assert len(runs) == 2, "one run per group, that of the prompts"


def test_caches_are_updated_in_place():
    """No copy of a whole cache buffer in any loop: each token would pay for all positions of all layers."""
    pipe, params = pipeline(causal(), 2)
    pipe.states.see(prompts(6)[None])
    request = Request(6, 4, 5, Sampling())
    grouped = prompts(6).reshape(2, 3, 4).astype(np.int32)
    given = grouped, np.arange(6, dtype=np.int32).reshape(2, 3), np.float32(1), jax.random.key(0)
    program = pipe.generator._jitted.lower(params, *given, pipe.states.brought(None), request=request)
    text = program.compile().as_text()
    buffer = rf"f32\[(?:2,2|4),3,9,{WIDTH}\]"
    assert re.search(rf"= {buffer}\S* dynamic-update-slice\(", text), "the buffer of a leaf of two layers is not found"
    copies = [line for line in text.splitlines() if re.search(rf"= {buffer}\S* copy\(", line)]
    assert len(copies) <= 2, copies  # keys and values begin as the same zeros


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)

    def __call__(self, x):
        return x + 9 * self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0], dtype=bool))


class LinenBlock(linen.Module):
    decode: bool = False

    @linen.compact
    def __call__(self, x):
        attention = linen.MultiHeadDotProductAttention(2, decode=self.decode)
        return x + 9 * attention(linen.LayerNorm()(x), mask=linen.make_causal_mask(x[..., 0], dtype=bool))


class NnxSum(nnx.Module):
    """A module with a cache in the form of jaxpipe: chunks of any length."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def init_cache(self, x, length):
        return jnp.zeros((x.shape[0], WIDTH), x.dtype)

    def __call__(self, x, cache=None, position=None):
        sums = jnp.cumsum(self.linear(x), axis=1)
        if cache is None:
            return x + jnp.tanh(sums)
        sums = sums + cache[:, None]
        return x + jnp.tanh(sums), sums[:, -1]


@pytest.mark.parametrize(("block", "data"), [(NnxBlock, 2), (LinenBlock, 1), (NnxSum, 1)])
def test_caches_of_flax_modules(block, data):
    ends = [jaxpipe.LayerSpec(nnx.Embed, VOCAB, WIDTH), jaxpipe.LayerSpec(nnx.Linear, WIDTH, VOCAB)]
    module = jaxpipe.PipelineModule([ends[0], *[jaxpipe.LayerSpec(block)] * 3, ends[1]], partition_method=[0, 2, 5])
    pipe, params = pipeline(module, 2, data)
    ids = prompts(4)
    np.testing.assert_array_equal(pipe.generate(params, ids, 4), by_hand(module, pipe.to_layers(params), ids, 4))


def mean_of_before(params, x):
    return x + jnp.tanh(jnp.cumsum(x @ params["w"], axis=1))


def mean_of_all(params, x):
    return x + (x @ params["w"]).mean(axis=1, keepdims=True)


def mixer(apply):
    return jaxpipe.Layer(lambda key, x: {"w": jax.random.normal(key, (WIDTH, WIDTH))}, apply, "Mixer")


def test_without_a_cache_the_window_is_run_again_and_it_is_said_once():
    module = jaxpipe.PipelineModule([EMBED, mixer(mean_of_before), ATTENTION, SCALE, HEAD], partition_method="uniform")
    pipe, params = pipeline(module, 2, 2)
    ids = prompts(3)
    with pytest.warns(UserWarning, match=r"layer 1 \(Mixer\) has no cache.*cumsum over the positions"):
        tokens = pipe.generate(params, ids, 4, stop=9)
    np.testing.assert_array_equal(tokens, by_hand(module, pipe.to_layers(params), ids, 4, stop=9))
    key = jax.random.key(2)
    tokens = pipe.generate(params, ids, 4, temperature=3.0, top_k=5, key=key)  # warnings are errors here
    np.testing.assert_array_equal(
        tokens, by_hand(module, pipe.to_layers(params), ids, 4, drawn(key, 3.0, 5)), "and it is not said again"
    )


def test_a_model_that_looks_ahead_is_refused():
    module = jaxpipe.PipelineModule([EMBED, mixer(mean_of_all), HEAD], partition_method="uniform")
    pipe, params = pipeline(module, 2)
    with (
        pytest.warns(UserWarning, match="has no cache"),
        pytest.raises(LayerError, match=r"layer 1 \(Mixer\).*not causal"),
    ):
        pipe.generate(params, prompts(2), 3)


def test_in_a_jit_of_the_caller_and_in_an_engine():
    module = causal([0, 3, 7])
    labels = prompts(2, seed=1)
    module.loss_fn = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    engine = jaxpipe.initialize(
        module, optax.sgd(1e-4), mesh=jaxpipe.make_mesh(pipe=2, data=1), example=(prompts(2), labels), key=3
    )
    engine.train_batch(iter([(prompts(2), labels)]))
    ids = prompts(3)
    wanted = by_hand(module, engine.to_layers(), ids, 5)
    np.testing.assert_array_equal(engine.generate(ids, max_new_tokens=5), wanted)
    inside = jax.jit(lambda params, ids: engine.pipe.generate(params, ids, 5))
    np.testing.assert_array_equal(inside(engine.state.params, ids), wanted)
    assert np.isfinite(engine.train_batch(iter([(prompts(2), labels)]))), "training goes on"


class Normed(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x, train=False):
        return self.norm(x, use_running_average=not train)


def shifted(params, state, x, *, cache=None, position=None):
    """Attention behind a shift that is state, which every call changes; evaluations must not."""
    x = attention(params, x + state["shift"][None, None], cache=cache, position=position)
    return x, {"shift": state["shift"] + 1}


def with_state(key, x):
    return ATTENTION.init(key, x), {"shift": jax.random.normal(key, (WIDTH,))}


SHIFTED = jaxpipe.Layer(with_state, shifted, "Shifted", stateful=True, init_cache=ATTENTION.init_cache)


@pytest.mark.parametrize("cached", [True, False])
def test_the_state_of_layers_is_read_and_not_changed(cached):
    whole = [] if cached else [mixer(mean_of_before)]
    layers = [EMBED, *[SHIFTED] * 2, jaxpipe.LayerSpec(Normed), *whole, *[SHIFTED] * 2, HEAD]
    module = jaxpipe.PipelineModule(
        layers,
        lambda y, t: optax.softmax_cross_entropy_with_integer_labels(y, t).mean(),
        partition_method=[0, 3, len(layers)],
    )
    ids = prompts(4)
    mesh = jaxpipe.make_mesh(pipe=2, data=2)
    engine = jaxpipe.initialize(module, optax.sgd(1e-5), mesh=mesh, example=(ids, ids), key=0)
    engine.train_batch(iter([(ids, ids)]))
    before = jax.device_get(engine.layer_state())
    wanted = by_hand(module, engine.to_layers(), ids, 4, layer_state=before)
    if not cached:
        with pytest.warns(UserWarning, match="has no cache"):
            np.testing.assert_array_equal(engine.generate(ids, 4), wanted)
        return
    np.testing.assert_array_equal(engine.generate(ids, 4), wanted)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(engine.layer_state()), before)
    with pytest.raises(LayerError, match="has state"):
        engine.pipe.generate(engine.state.params, ids, 4)
    none = [jax.tree.map(np.zeros_like, each) for each in before]
    other = engine.pipe.generate(engine.state.params, ids, 4, layer_state=none)
    assert (np.asarray(other) != wanted).any(), "another state gives other tokens"


@pytest.fixture(scope="module")
def small():
    return pipeline(causal(), 2)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (np.ones((2, 4)), {}, DataError, r"float32\[2,4\]. Prompts are ids of tokens: integers \[N, T\]"),
        (np.ones(4, int), {}, DataError, r"int32\[4\]. Prompts"),
        (np.ones((0, 4), int), {}, DataError, "Prompts"),
        ([[1, 2], []], {}, DataError, "Prompts are ids"),
        ({"source": prompts(2), "target": prompts(2)}, {}, DataError, "a dict.*evaluated once per token"),
        (["a"], {}, DataError, "Prompts are ids"),
        (
            np.full((2, 4), 2**40),
            {},
            DataError,
            "int64, from 1099511627776 to 1099511627776. Ids of tokens are from 0 to 2147483647",
        ),
        ([[-1, 1]], {}, DataError, "int64, from -1 to 1. Ids of tokens"),
        ([[VOCAB, 1]], {}, DataError, "the id 13, but the model knows 13 tokens, 0 to 12"),
        (prompts(2), {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0 must be an integer, 1 or more"),
        (prompts(2), {"temperature": -1}, ConfigError, "temperature=-1"),
        (prompts(2), {"temperature": "hot"}, ConfigError, "temperature='hot'"),
        (prompts(2), {"top_k": 3}, ConfigError, "top_k=3 needs a temperature above 0"),
        (prompts(2), {"top_k": 0, "temperature": 1}, ConfigError, "top_k=0 must be an integer"),
        (prompts(2), {"top_k": 14, "temperature": 1}, ConfigError, "top_k=14: the model knows 13 tokens"),
        (prompts(2), {"stop": 13}, ConfigError, "stop=13 is no token"),
        (prompts(2), {"stop": 1.5}, ConfigError, "stop=1.5 must be one token"),
        (prompts(2), {"key": "a"}, ConfigError, "key='a'"),
        (prompts(2), {"max_new_tokens": 9}, ValueError, f"room for {MOST} positions, not for 13"),
    ],
    ids=lambda value: next(iter(value), "plain") if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_named(small, ids, options, error, message):
    pipe, params = small
    with pytest.raises(error, match=message):
        pipe.generate(params, ids, **{"max_new_tokens": 3, **options})


def test_a_layer_that_does_not_keep_to_the_rules_is_named():
    def other(params, x, *, cache=None, position=None):
        return x if cache is None else (x, cache.astype(jnp.bfloat16))

    def none(params, x, *, cache=None, position=None):
        return x

    def fresh(x, length):
        return jnp.zeros((x.shape[0], length))

    for apply, message in ((other, "returns another cache"), (none, "returned a .*pair")):
        layer = jaxpipe.Layer(lambda key, x: {}, apply, "Odd", init_cache=fresh)
        pipe, params = pipeline(jaxpipe.PipelineModule([EMBED, layer, HEAD], partition_method="uniform"))
        with pytest.raises(LayerError, match=rf"layer 1 \(Odd\).*{message}"):
            pipe.generate(params, prompts(2), 2)
    pipe, params = pipeline(jaxpipe.PipelineModule([EMBED, ATTENTION, lambda x: x.mean()], partition_method="uniform"))
    with pytest.raises(LayerError, match=r"generate needs logits.*layer 2.*returns float32\[\]"):
        pipe.generate(params, prompts(2), 2)
    with pytest.raises(LayerError, match="has an init_cache, but its apply takes no `cache`"):
        jaxpipe.PipelineModule([jaxpipe.Layer(lambda key, x: {}, lambda params, x: x, init_cache=fresh)])
    with pytest.raises(LayerError, match="init_cache=3"):
        jaxpipe.Layer(lambda key, x: {}, lambda params, x: x, init_cache=3)
