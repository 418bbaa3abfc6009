"""nnx modules as layers: the mode they are told, their streams, and what a call would lose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.errors import LayerError
from tests.compare import assert_close
from tests.model.flax_layers import Block, Spec, X, dropped, factor, run


class Flag(nnx.Module):
    """No random streams at all."""

    def __call__(self, x, train=False):
        return x * (2.0 if train else 3.0)


class Required(nnx.Module):
    def __call__(self, x, *, train):
        return x * (2.0 if train else 3.0)


class Deterministic(nnx.Module):
    def __init__(self, *, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, deterministic=True):
        return self.drop(x, deterministic=deterministic)


class TrainDrop(Deterministic):
    def __call__(self, x, train=False):
        return self.drop(x, deterministic=not train)


class Undrawn(Deterministic):
    """Has streams, and a flag that is not for them."""

    def __call__(self, x, train: bool):
        return self.drop(x) * (2.0 if train else 3.0)


class Number(nnx.Module):
    def __call__(self, x, train=2.5):
        return x * train


class Frozen(nnx.Module):
    """Switches that the constructor has set."""

    def __init__(self, deterministic, *, rngs):
        self.inner = nnx.Dropout(0.5, deterministic=deterministic, rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class Attribute(nnx.Module):
    def __init__(self):
        self.deterministic = None

    def __call__(self, x):
        return x * (3.0 if self.deterministic else 2.0)


def test_nnx_modules_are_told_the_mode():
    for module in (Flag, Required, Attribute):
        assert factor(Spec(module)) == 2.0 and factor(Spec(module), train=False) == 3.0
    assert factor(Spec(Number)) == 2.5
    for module in (Deterministic, TrainDrop, Undrawn):
        assert dropped(Spec(module))
        assert not dropped(Spec(module), train=False)
        assert not dropped(Spec(module), key=None), "no dropout without a key"
    assert factor(Spec(Undrawn), key=None) == 2.0, "it draws nothing then, so it may be told that it trains"
    assert factor(Spec(Undrawn), train=False) == 3.0
    tied = jaxpipe.TiedLayerSpec("t", Flag, forward_fn=lambda m, x, *, train: m(x, train=train) * 5.0)
    assert factor(tied) == 10.0 and factor(tied, train=False) == 15.0
    assert not dropped(Spec(Frozen, True)), "set at construction"
    assert dropped(Spec(Frozen, False)) and not dropped(Spec(Frozen, False), train=False)
    assert not dropped(Spec(nnx.Dropout, 0.5, deterministic=True)) and dropped(Spec(nnx.Dropout, 0.5))


class Many(nnx.Module):
    """Blocks as one, scanned or vmapped, with streams that are forked."""

    def __init__(self, how, *, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Block(8, rngs=rngs), in_axes=(0,), out_axes=0))
        self.blocks, self.how = make(rngs), how

    def __call__(self, x):
        if self.how == "scan":
            return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None), out_axes=0)(self.blocks, x).sum(0)


class Forked(nnx.Module):
    def __init__(self, *, rngs):
        self.rngs = rngs.fork(split=4)

    def __call__(self, x):
        return nnx.vmap(lambda rngs, row: row * jax.random.uniform(rngs.dropout()))(self.rngs, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flax, about fork
@pytest.mark.parametrize("entry", [Spec(Many, "scan"), Spec(Many, "vmap"), Spec(Forked)])
def test_streams_keep_their_shape(entry):
    first, other = run(entry), run(entry, key=jax.random.key(4))
    assert first.shape == X.shape and (first != other).any()
    assert jnp.unique(first[:, 0]).size > 1, "every row has a key of its own"


class Hidden(nnx.Module):
    """An array of the constructor where nobody looks."""

    def __init__(self, where, *, rngs):
        table = jnp.arange(8.0) + 1
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        if where == "closure":
            self.function = lambda x: x * table
        elif where == "partial":
            self.function = functools.partial(lambda table, x: x * table, table)
        elif where == "list":
            self.function = [table].__getitem__
        else:
            self.function = table

    def __call__(self, x):
        table = jnp.arange(8.0) + 1
        if callable(self.function):
            x = x * self.function(0) if isinstance(self.function, type([].append)) else self.function(x)
        else:
            x = x * jnp.broadcast_to(self.function, x.shape)
        return jnp.zeros_like(self.dense(x)) + x - x + jnp.broadcast_to(table, x.shape) * x


@pytest.mark.parametrize("where", ["closure", "partial", "attribute"])
def test_arrays_of_a_constructor_out_of_sight(where):
    module = jaxpipe.PipelineModule([Spec(Hidden, where)] * 2, lambda y, t: y.mean(), [0, 1, 2])
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 1)
    with jax.numpy_rank_promotion("allow"):
        params = pipe.init(0, X)
        loss = pipe.evaluate(params, (X[None], None))
    table = np.arange(8.0) + 1
    assert_close(loss, np.mean(table**4, dtype=np.float32), 1e-6)


class Writes(nnx.Module):
    def __init__(self, how, *, rngs):
        self.how = how
        self.scale = nnx.Param(jnp.ones(()))
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        if self.how == "param":
            self.scale[...] = self.scale[...] * 2.0
        elif self.how == "same":
            self.scale.set_value(self.scale.get_value())
        elif self.how == "sow":
            self.sow(nnx.Intermediate, "h", x)
        elif self.how == "new":
            self.extra = nnx.Param(x)
        elif self.how == "cache":
            self.extra = nnx.Cache(x)
        elif self.how in ("jit", "remat"):

            def inner(module, x):
                return module.drop(x) * module.scale[...]

            return (nnx.jit if self.how == "jit" else nnx.remat)(inner)(self, x)
        elif self.how == "inside":

            def inner(module, x):
                module.scale[...] = module.scale[...] + 1.0
                return x

            return nnx.jit(inner)(self, x)
        return self.drop(x) * self.scale[...]


@pytest.mark.filterwarnings("ignore:layer 0 .* sows 'h'")
@pytest.mark.parametrize("how", ["same", "sow", "jit", "remat"])
def test_calls_that_lose_nothing(how):
    assert run(Spec(Writes, how)).shape == X.shape
    jaxpipe.PipelineModule([Spec(Writes, how)]).shapes(X)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("param", r"layer 1 \(Writes\) writes to the nnx.Param 'scale' in its call"),
        ("inside", "writes to the nnx.Param 'scale'"),
        ("new", r"makes the variable 'extra' \(Param\) in its call"),
        ("cache", r"makes the variable 'extra' \(Cache\)"),
    ],
)
def test_what_would_be_lost_is_refused(how, message):
    with pytest.raises(LayerError, match=message):
        jaxpipe.PipelineModule([jnp.tanh, Spec(Writes, how)]).shapes(X)


def test_an_array_that_is_no_variable_is_not_written():
    class Counts(nnx.Module):
        def __init__(self):
            self.total = nnx.data(jnp.zeros(()))

        def __call__(self, x):
            self.total = self.total + x.sum()
            return x + self.total

    with pytest.raises(LayerError, match=r"writes to 'total' in its call, an array that is no variable.*nnx.Variable"):
        jaxpipe.PipelineModule([jaxpipe.LayerSpec(Counts)]).shapes(jnp.ones((2, 3)))
