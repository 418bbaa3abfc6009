"""Modules that are built already, as entries of a layer list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.model.context import Context
from jaxpipe.model.layers import bind
from tests.model.flax_layers import KEY, Block, X


def apply(layer, x=X, key=None, train=False):
    return layer.apply(layer.init(jax.random.key(0), x), x, Context(key), train)[0]


class Numbered(nnx.Module):
    """Like `Block`, with arrays and numbers that are no weights."""

    def __init__(self, factor, number, *, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs, kernel_init=nnx.initializers.normal(0.1))
        self.factor, self.table = factor, jnp.full((4, 8), number)
        self.act = nnx.gelu

    def __call__(self, x):
        return self.act(self.dense(x)) * self.table * self.factor

    def twice(self, x):
        return self(self(x))


class Head(nnx.Module):
    def __init__(self, embed):
        self.inner = embed

    def __call__(self, x):
        return self.inner.attend(x)


class Bad(nnx.Module):
    def __init__(self, other):
        self.function = lambda x: other(x)

    def __call__(self, x):
        return self.function(x)


def test_weights_are_those_of_the_module():
    rngs = nnx.Rngs(0)
    blocks = [Block(8, rngs=rngs) for _ in range(2)]
    layers = bind(blocks)
    assert layers[0].kind is layers[1].kind and layers[0] is not layers[1]
    for module, layer in zip(blocks, layers, strict=True):
        assert layer.init(jax.random.key(7), X)["dense"]["kernel"] is module.dense.kernel[...]
        module.eval()
        np.testing.assert_array_equal(apply(layer), module(X))
        dropped = apply(layer, key=KEY, train=True)  # whatever mode the module was in
        assert 8 <= (dropped == X).sum() <= 24
    assert blocks[0].drop.deterministic, "it is what it was"
    assert not (apply(layers[0]) == apply(layers[1])).all()


def test_what_makes_modules_alike():
    """The weights and random streams may differ; anything else, an array or a number, may not."""
    rngs = nnx.Rngs(0)
    modules = [Numbered(*both, rngs=rngs) for both in ((1.0, 2.0), (1.0, 2.0), (3.0, 2.0), (1.0, 4.0))]
    same, also, factor, table = layers = bind(modules)
    assert same.kind is also.kind and len({id(layer.kind) for layer in (same, factor, table)}) == 3
    for module, layer in zip(modules, layers, strict=True):
        np.testing.assert_allclose(apply(layer), module(X), rtol=1e-6)
    dense = [linen.Dense(8, name=name) for name in ("a", "b")]
    one, two, other = bind([m.bind(m.init(KEY, X)) for m in (*dense, linen.Dense(8, use_bias=False))])
    assert one.kind is two.kind is not other.kind


def test_methods_and_further_functions():
    module = Numbered(1.0, 2.0, rngs=nnx.Rngs(0))
    named = jaxpipe.TiedLayerSpec("k", module, forward_fn=lambda m, x: 3 * m(x))
    plain, twice, tied = bind([module, module.twice, named])
    assert plain.tie == twice.tie == tied.tie is not None
    np.testing.assert_allclose(apply(twice), module(module(X)), rtol=1e-6)
    np.testing.assert_allclose(apply(tied), 3 * module(X), rtol=1e-6)
    assert [layer.name for layer in (plain, twice, tied)] == ["Numbered", "Numbered.twice", "Numbered"]
    (alone,) = bind([module.twice])
    assert alone.tie is None
    assert jaxpipe.PipelineModule([module, jnp.tanh, module]).owners == (0, 1, 0)


class Whole(linen.Module):
    def setup(self):
        self.embed, self.dense = linen.Embed(11, 8), linen.Dense(8)

    def __call__(self, x):
        return self.embed.attend(self.dense(self.embed(x)))


def test_linen():
    ids = jnp.arange(8).reshape(2, 4)
    bound = Whole().bind(Whole().init(KEY, ids))
    embed, dense, head = bind([bound.embed, bound.dense, bound.embed.attend])
    assert embed.tie == head.tie is not None and dense.tie is None
    x = apply(dense, apply(embed, ids))
    np.testing.assert_allclose(apply(head, x), bound(ids), rtol=1e-5)
    with pytest.raises(LayerError, match="'embedding' of layer 0 .Embed. is also 'embed.*' of layer 1|'' of layer 0"):
        bind([bound.embed, bound])
    boxed = linen.Dense(8, kernel_init=linen.with_partitioning(linen.initializers.ones, (None, "model")))
    (layer,) = bind([boxed.bind(boxed.init(KEY, X))])
    assert layer.kind.annotations.keys() == {"kernel"} and layer.given["kernel"].shape == (8, 8)


def test_modules_of_shapes():
    module = nnx.eval_shape(lambda: Block(8, rngs=nnx.Rngs(0)))
    pipe = jaxpipe.Pipeline(jaxpipe.PipelineModule([module]), jaxpipe.make_mesh(pipe=1))
    with pytest.raises(LayerError, match="layer 0 .Block. was built on shapes alone .*Pass `layers`"):
        pipe.init(0, X)
    layer = {"dense": {"kernel": np.eye(8, dtype=np.float32), "bias": np.ones(8, np.float32)}}
    params = pipe.from_layers([layer])
    found = pipe.evaluate(params, (X[None], None), return_logits=True, compute_loss=False)
    np.testing.assert_allclose(found[0], 2 * X + 1)
    with pytest.raises(LayerError, match="layer 0, Numbered was built on shapes alone, and has the array 'table'"):
        bind([nnx.eval_shape(lambda: Numbered(1.0, 2.0, rngs=nnx.Rngs(0)))])


@pytest.mark.parametrize(
    ("kind", "way"), [(nnx.List, r"\*blocks,"), (lambda a: nnx.Dict(a=a[0]), r"\*blocks.values\(\)")]
)
def test_a_list_of_modules_is_unpacked(kind, way):
    blocks = kind([nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
    with pytest.raises(LayerError, match=f"layer 1, (List|Dict) is an nnx.*holds modules.*{way}"):
        jaxpipe.PipelineModule([jnp.sin, blocks], jnp.mean)


def test_what_is_refused():
    rngs = nnx.Rngs(0)
    embed = nnx.Embed(8, 8, rngs=rngs)
    with pytest.raises(
        LayerError, match=r"nnx.Param 'embedding' of layer 0 \(Embed\) is also 'inner.embedding' of layer 2 \(Head\)"
    ):
        bind([embed, jnp.tanh, Head(embed)])
    with pytest.raises(LayerError, match="layer 0, Bad has the attribute 'function', a function that holds a module"):
        bind([Bad(embed)])
    other = jaxpipe.TiedLayerSpec("k", embed, forward_fn=lambda m, x: m.attend(Block(8, rngs=rngs)(x)))
    bind([other])  # makes a module, and holds none
    block = Block(8, rngs=rngs)
    with pytest.raises(LayerError, match="layer 0, Embed has a forward_fn that uses another module, a Block"):
        bind([jaxpipe.TiedLayerSpec("k", embed, forward_fn=lambda m, x: m.attend(block(x)))])
    with pytest.raises(LayerError, match="built already, and takes no arguments"):
        bind([jaxpipe.LayerSpec(embed, 8)])
    with pytest.raises(LayerError, match="has no __call__"):
        bind([Callless()])


class Callless(nnx.Module):
    pass
