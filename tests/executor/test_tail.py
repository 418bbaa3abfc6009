"""The tail against `jax.vjp`, and where it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.executor.seeds import Seeds
from jaxpipe.executor.tail import Tail, split_tail
from jaxpipe.layout.layout import Address
from jaxpipe.layout.stages import Part, Stage
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.layers import Kind
from jaxpipe.model.precision import Precision
from jaxpipe.model.shapes import avals
from tests.compare import assert_close

KIND = Kind(lambda key, x: {}, lambda p, x, c: (x, Aux()))
rng = np.random.default_rng(0)


def stage(parts, is_last=True):
    return Stage(tuple(parts), False, is_last, None, None)


def test_the_tail_is_the_trailing_single_layers_of_the_last_stage():
    run = Part(KIND, 0, 3, Address("stacked", "a"))
    one_of_a_stack = Part(KIND, 3, 1, Address("stacked", "b"))
    bare_run = Part(KIND, 3, 2)
    norm, head = Part(KIND, 4, 1), Part(KIND, 5, 1, Address("shared", "5"))
    assert split_tail(stage([run, norm, head])) == ((run,), (norm, head))
    assert split_tail(stage([norm, run, head])) == ((norm, run), (head,))
    assert split_tail(stage([run, one_of_a_stack])) == ((run, one_of_a_stack), ())
    assert split_tail(stage([head, bare_run])) == ((head, bare_run), ())
    assert split_tail(stage([norm, head])) == ((), (norm, head))
    assert split_tail(stage([run, norm, head], is_last=False)) == ((run, norm, head), ())


def dense(params, x, key):
    noise = 0 if key is None else jax.random.normal(key, (3,))[0]
    return {"h": jnp.tanh(x["h"] @ params["w"]) * params["n"].astype(jnp.float32) + noise, "ids": x["ids"]}


def traced(params, x, context):
    return dense(params, x, context.key), Aux({"n": params["n"]})


def weighted(y, t):
    each = ((y["h"] - t) ** 2).sum(-1) * y["ids"].astype(jnp.float32)
    return jaxpipe.Weighted(each.sum(), jnp.float32(5.0)), {"metric": each.max()}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_total_and_gradients_start_from_the_seed(count):
    parts = [Part(KIND, n, 1, Address("shared", str(n)), run=traced) for n in range(count)]
    params = [{"w": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32), "n": jnp.int32(2)} for _ in range(count)]
    x = {"h": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "ids": jnp.arange(4)}
    labels = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    keys = [jax.random.key(n) if n else None for n in range(count)]
    seed = jnp.float32(0.125)
    contexts = [Context(key) for key in keys]
    tail = Tail(parts, weighted, *avals((params, x, contexts, labels)))
    loss, metrics, beside, *found = tail.loss_and_gradient(params, x, contexts, labels, Seeds(seed))
    assert metrics.keys() == {"metric"}
    assert [aux.state for aux in beside] == [{"n": 2}] * count

    def total(weights, h):
        y = {"h": h, "ids": x["ids"]}
        for w, held, key in zip(weights, params, keys, strict=True):
            y = dense({**held, "w": w}, y, key)
        return weighted(y, labels)[0].total

    wanted, pullback = jax.vjp(total, [held["w"] for held in params], x["h"])
    dparams, dx = pullback(seed)
    assert_close((loss, *found), (wanted, dparams, [dx]), 1e-6)


def test_the_loss_gets_long_floats_and_the_layers_short_gradients():
    seen = []

    def loss(y, t):
        seen.append(y.dtype)
        return (y * 1.5).mean()

    like = jax.ShapeDtypeStruct((4,), jnp.float16)
    tail = Tail([], loss, [], like, [], None, Precision("float16"))
    seeds = Seeds(jnp.float32(2.0**10))
    total, *_, dx = tail.loss_and_gradient([], jnp.full((4,), 50000.0, jnp.float16), [], None, seeds)
    assert set(seen) == {jnp.dtype(jnp.float32)} and total == 74976, "more than float16 holds"
    assert dx[0].dtype == jnp.float16 and (dx[0] == 384).all()


def test_the_output_of_the_last_layer_as_the_loss():
    tail = Tail([], None, [], jax.ShapeDtypeStruct((), jnp.bfloat16), [], None)
    total, *_, dparams, dx = tail.loss_and_gradient([], jnp.bfloat16(3.0), [], None, Seeds(jnp.float32(0.5)))
    assert total.dtype == jnp.float32 and total == 3 and dparams == []
    assert dx[0].dtype == jnp.bfloat16 and dx[0] == 0.5
