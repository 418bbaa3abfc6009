"""What stands behind a `LayerSpec`, and functions that use a module which is built already."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.model.layers import bind
from tests.model.flax_layers import Block, Spec, X, factor, run


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
    ids=map(str, range(15)),
)
def test_weights_that_would_be_frozen_are_refused(entry):
    with pytest.raises(
        LayerError, match="Layer 1.* built already .*never be trained. Put the module itself into the list"
    ):
        bind([jnp.tanh, entry])


def test_functions_without_weights_are_fine():
    table, graph = jnp.ones(8), nnx.graphdef(BUILT)
    state = nnx.to_pure_dict(nnx.state(BUILT))
    pair = jaxpipe.Layer(lambda key, x: state, lambda p, x: nnx.merge(graph, nnx.State(p)).attend(x))
    bind([lambda x: x * table, nnx.relu, functools.partial(jnp.clip, min=0), pair, closed_over(linen.Dense(3))])
