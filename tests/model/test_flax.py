"""flax modules as layers: flags, switches, streams, targets, what is lost, what would be frozen."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.model.layers import bind
from tests.compare import assert_close

X = jnp.ones((4, 8))
KEY = jax.random.key(3)
Spec = jaxpipe.LayerSpec


def run(entry, train=True, key=KEY, x=X):
    (layer,) = bind([entry])
    params = layer.init(jax.random.key(0), x)
    return jax.jit(lambda p, x, k: layer.apply(p, x, k, train))(params, x, key if layer.uses_key else None)


def factor(entry, **options):
    return float(run(entry, **options)[0, 0])


def dropped(entry, **options):
    y = np.asarray(run(entry, **options))
    return bool((y == 0).any())


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


class LinenFlag(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return x * (2.0 if train else 3.0)


class LinenNumber(linen.Module):
    def __call__(self, x, train=2.5):
        return x * train


class LinenTrainDrop(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        return linen.Dropout(0.5, deterministic=not train)(x)


class LinenNoise(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        if not train:
            return x
        a, b = self.make_rng("noise"), self.make_rng("other")
        return x + jax.random.normal(a, x.shape) + 10.0 * jax.random.normal(b, x.shape)


class Unconditional(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


def test_linen_modules_are_told_the_mode_and_given_streams():
    assert factor(Spec(LinenFlag)) == 2.0 and factor(Spec(LinenFlag), train=False) == 3.0
    assert factor(Spec(LinenFlag), key=None) == 2.0, "it draws nothing"
    assert factor(Spec(LinenNumber)) == 2.5
    assert dropped(Spec(LinenTrainDrop)) and not dropped(Spec(LinenTrainDrop), key=None)
    assert dropped(Spec(linen.Dropout, 0.5)) and not dropped(Spec(linen.Dropout, 0.5, deterministic=True))
    assert dropped(Spec(linen.remat(LinenTrainDrop, static_argnums=(2,))))
    noisy = run(Spec(LinenNoise))
    assert jnp.unique(noisy).size == noisy.size and (run(Spec(LinenNoise)) == noisy).all()
    assert (run(Spec(LinenNoise), key=jax.random.key(4)) != noisy).all()
    assert (run(Spec(LinenNoise), train=False) == X).all()
    assert (run(Spec(Unconditional)) != X).all()


def test_a_missing_stream_is_the_users_own_error():
    module = jaxpipe.PipelineModule([jnp.tanh, Spec(Unconditional)])
    module.shapes(X)
    with pytest.raises(Exception, match='needs PRNG for "noise"') as caught:
        module.shapes(X, train=False, key=None)
    assert type(caught.value).__name__ == "InvalidRngError"
    assert "Raised in layer 1 (Unconditional)" in caught.value.__notes__[-1]


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.dense(x))


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


# ------------------------------------------------------------------------------------------------------------ targets


class Forwards(nnx.Module):
    def __init__(self, width, **keywords):
        self.dense = nnx.Linear(width, width, **keywords)

    def __call__(self, x):
        return self.dense(x)


class Options(nnx.Module):
    """Its keywords go to something that takes no `rngs`."""

    def __init__(self, **keywords):
        self.scale = (lambda *, scale=1.0: scale)(**keywords)

    def __call__(self, x):
        return x * self.scale


def factory(width, *, rngs):
    return nnx.Linear(width, width, rngs=rngs)


def linen_factory(width):
    return linen.Dense(width)


def subclass(width):
    class Wide(nnx.Linear):
        def __init__(self, *, rngs):
            super().__init__(width, width, rngs=rngs)

    return Wide


def test_targets():
    dense = [
        Spec(Forwards, 8),
        Spec(functools.partial(nnx.Linear, 8), 8),
        Spec(functools.partial(functools.partial(nnx.Linear, 8), out_features=8)),
        Spec(factory, 8),
        Spec(linen_factory, 8),
        Spec(subclass(8)),
        Spec(functools.partial(linen.Dense, features=8)),
        Spec(linen.remat(linen.Dense), 8),
    ]
    for entry in dense:
        assert run(entry).shape == X.shape and abs(factor(entry)) > 0
    assert factor(Spec(Options, scale=4.0)) == 4.0
    first, second = bind([Spec(functools.partial(nnx.Linear, 8), 8), Spec(nnx.Linear, 8, 8)])
    assert first.kind is second.kind


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: Spec(nnx.remat(nnx.Linear), 8, 8), "wraps the constructor of Linear.*@nnx.remat on its __call__"),
        (lambda: Spec(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0))), "made a Linear. It has weights already: .*`rngs`"),
        (lambda: Spec(Block(8, rngs=nnx.Rngs(0)), 3), "the target is a module that is built already"),
        (lambda: Spec(nnx.Param, 3), "made a Param"),
    ],
)
def test_targets_that_make_no_layer(spec, message):
    with pytest.raises(LayerError, match=message):
        bind([spec()])


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


# ------------------------------------------------------------------------------------------------- writes in the call


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flax, about sow
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


# ------------------------------------------------------------------------------------------------------ built modules

BUILT = nnx.Embed(8, 8, rngs=nnx.Rngs(0))
BOUND = linen.Dense(8).bind(linen.Dense(8).init(jax.random.key(0), X))


class Holder:
    def __init__(self, module):
        self.parts = {"inner": [module]}

    def __call__(self, x):
        return self.parts["inner"][0](x)


def closed_over(module):
    return lambda x: module.attend(x)


@pytest.mark.parametrize(
    "entry",
    [
        BUILT.attend,
        BOUND.__call__,
        linen.Dense(8).__call__,
        functools.partial(BUILT.attend),
        functools.partial(BUILT),
        functools.partial(lambda m, x: m(x), BUILT),
        closed_over(BUILT),
        closed_over([BUILT]),
        closed_over(BOUND),
        lambda x: BUILT.attend(x),
        lambda x, m=BUILT: m(x),
        lambda x: jax.vmap(lambda row: BUILT.attend(row))(x),
        Holder(BUILT),
        jax.jit(closed_over(BUILT)),
        jax.checkpoint(BUILT.attend),
        functools.partial(closed_over(BUILT)),
        jaxpipe.TiedLayerSpec("k", nnx.Linear, 8, 8, forward_fn=lambda m, x: m(BUILT(x))),
    ],
    ids=map(str, range(17)),
)
def test_weights_that_would_be_frozen_are_refused(entry):
    with pytest.raises(LayerError, match="Layer 1.* built already .*never be trained. Write jaxpipe.LayerSpec"):
        bind([jnp.tanh, entry])


def test_functions_without_weights_are_fine():
    table, graph = jnp.ones(8), nnx.graphdef(BUILT)
    state = nnx.to_pure_dict(nnx.state(BUILT))
    pair = jaxpipe.Layer(lambda key, x: state, lambda p, x: nnx.merge(graph, nnx.State(p)).attend(x))
    bind([lambda x: x * table, nnx.relu, functools.partial(jnp.clip, min=0), pair, closed_over(linen.Dense(3))])


# ------------------------------------------------------------------------------------------- metadata about partitions


class Annotated(nnx.Module):
    def __init__(self, axes, *, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
        self.dense = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


class LinenAnnotated(linen.Module):
    axes: tuple
    logical: bool = False

    @linen.compact
    def __call__(self, x):
        wrap = linen.with_logical_partitioning if self.logical else linen.with_partitioning
        return linen.Dense(8, kernel_init=wrap(linen.initializers.lecun_normal(), self.axes))(x)


@pytest.mark.parametrize(
    "entry",
    [
        lambda axes: Spec(Annotated, axes),
        lambda axes: Spec(LinenAnnotated, axes),
        lambda axes: Spec(LinenAnnotated, axes, True),
    ],
    ids=["nnx", "linen", "logical"],
)
def test_metadata_is_taken_off_and_its_axes_are_told(entry):
    def loss(y, t):
        return (y**2).mean()

    with pytest.warns(UserWarning, match=r"Annotated\(.*name the axes \['model'\]") as told:
        module = jaxpipe.PipelineModule([entry((None, "model"))] * 3, loss)
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 1)
        params = pipe.init(0, X)
        found, grads = pipe.value_and_grad(params, (X[None], None))
    assert len(told) == 1
    layers = pipe.to_layers(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = jaxpipe.PipelineModule([entry((None, None))] * 3, loss)
        other = jaxpipe.Pipeline(plain, jaxpipe.make_mesh(pipe=2), 1)
        wanted, wanted_grads = other.value_and_grad(other.from_layers(jax.device_get(layers)), (X[None], None))
    assert_close((found, pipe.to_layers(grads)), (wanted, other.to_layers(wanted_grads)), 1e-6)


class Dropping(linen.Module):
    """Dropout that the constructor has turned on, as a field."""

    deterministic: bool = False

    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=self.deterministic)(x)


def test_a_field_of_a_linen_module_is_turned_off_in_evaluation():
    x = np.ones((2, 4, 8), np.float32)
    module = jaxpipe.PipelineModule([jaxpipe.LayerSpec(Dropping, deterministic=False)], lambda y, t: y.mean())
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(), 2)
    params = pipe.init(0, x[0])
    _, outputs = pipe.evaluate(params, (x, x), return_logits=True)
    np.testing.assert_array_equal(outputs, x)
    assert pipe.value_and_grad(params, (x, x))[0] == 1  # without a key there is no dropout
    assert pipe.value_and_grad(params, (x, x), 3)[0] != 1
