"""What flax modules sow: taken where the spec says so, and told of otherwise, once."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe import LayerSpec
from jaxpipe.errors import LayerError
from jaxpipe.model.sown import SownValue, Takes

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


class Loss(nnx.Variable):
    pass


class Inner(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        y = self.dense(x)
        self.sow(Loss, "size", (y**2).mean())
        self.sow(nnx.Intermediate, "mean", y.mean())
        return y


class Outer(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = Inner(rngs=rngs)

    def __call__(self, x):
        return self.inner(jnp.tanh(self.inner(x)))


class LinenInner(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.Dense(3)(x)
        self.sow("losses", "size", (y**2).mean())
        self.sow("intermediates", "mean", y.mean())
        return y


class LinenOuter(linen.Module):
    def setup(self):
        self.inner = LinenInner()

    def __call__(self, x):
        return self.inner(jnp.tanh(self.inner(x)))


class Running(linen.Module):
    """A loss by a rule of its own, a sum that starts at 1, beside a metric with a dim of its own."""

    @linen.compact
    def __call__(self, x, _):
        y = linen.Dense(3)(x)
        for part in (y, y - 1):
            self.sow("losses", "size", (part**2).mean(), init_fn=lambda: jnp.float32(1), reduce_fn=jnp.add)
        self.sow("intermediates", "mean", y.mean(0))
        return jnp.tanh(y), None


class LinenLoop(linen.Module):
    """Blocks that are scanned over, in two scans around each other; `axis` is the dim of the inner one in metrics."""

    axis: int = 0

    @linen.compact
    def __call__(self, x):
        inner = linen.scan(
            linen.remat(Running),
            variable_axes={"params": 0, "losses": 0, "intermediates": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        outer = linen.scan(
            inner,
            variable_axes={"params": 0, "losses": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=2,
        )
        return outer(name="blocks")(x, None)[0]


class RunningNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        y = self.dense(x)
        for part in (y, y - 1):
            self.sow(Loss, "size", (part**2).mean(), init_fn=lambda: jnp.float32(1), reduce_fn=jnp.add)
        self.sow(nnx.Intermediate, "mean", y.mean(0))
        return jnp.tanh(y)


class NnxLoop(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.split_rngs(splits=6)(nnx.vmap(lambda rngs: RunningNnx(rngs=rngs)))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


SPECS = {
    "nnx": (LayerSpec(Outer), {"losses": Loss, "metrics": (nnx.Intermediate,)}),
    "linen": (LayerSpec(LinenOuter), {"losses": ("losses",), "metrics": "intermediates"}),
}


def weights(params):
    inner = params["inner"]
    held = inner.get("dense") or inner["Dense_0"]
    return held["kernel"], held["bias"]


def by_hand(layers, x):
    losses, means = 0.0, []
    for params in layers:
        kernel, bias = weights(params)
        for bend in (jnp.tanh, lambda y: y):
            y = x @ kernel + bias[None]
            losses, means = losses + (y**2).mean(), [*means, y.mean()]
            x = bend(y)
    return (x**2).mean(), losses, sum(means) / len(means)


def engine_of(spec, other=None):
    module = jaxpipe.PipelineModule([spec, other or spec], lambda y, t: (y**2).mean(), "uniform")
    mesh = jaxpipe.make_mesh(pipe=2)
    return jaxpipe.initialize(module, optax.sgd(0.1), mesh=mesh, example=(X, X), config={"num_micro_batches": 1})


@pytest.mark.parametrize("kind", SPECS)
def test_taken_by_the_spec(kind):
    spec, takes = SPECS[kind]
    engine = engine_of(spec.sown(**takes))
    layers = jax.device_get(engine.to_layers())
    mean, size, means = by_hand(layers, X)
    grads = jax.grad(lambda layers: sum(by_hand(layers, X)[:2]))(layers)
    loss = engine.train_batch(iter([(X, X)]))
    np.testing.assert_allclose(loss, mean + size, 1e-5)
    np.testing.assert_allclose(engine.metrics["inner/size"], size, 1e-5)
    np.testing.assert_allclose(engine.metrics["inner/mean"], means, 1e-5)
    np.testing.assert_allclose(engine.grad_norm, optax.tree.norm(grads), 1e-5)
    assert engine.metrics.keys() == {"loss", "grad_norm", "inner/size", "inner/mean"}


LOOPS = {
    "linen": (LayerSpec(LinenLoop), {"losses": "losses", "metrics": "intermediates"}),
    "linen, dims of loops elsewhere": (LayerSpec(LinenLoop, axis=1), {"losses": "losses", "metrics": "intermediates"}),
    "nnx": (LayerSpec(NnxLoop), {"losses": Loss, "metrics": nnx.Intermediate}),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_blocks_that_are_scanned_over_are_as_a_list_of_them(kind):
    spec, takes = LOOPS[kind]
    engine = engine_of(spec.sown(**takes))
    layers = jax.device_get(engine.to_layers())

    def by_hand(layers):
        x, sizes, means = X, 0.0, []
        for held in layers:
            flat = {
                jax.tree_util.keystr(path).split("'")[-2]: a for path, a in jax.tree_util.tree_leaves_with_path(held)
            }
            for kernel, bias in zip(flat["kernel"].reshape(6, 3, 3), flat["bias"].reshape(6, 3), strict=True):
                y = x @ kernel + bias[None]
                sizes, means = sizes + 1 + (y**2).mean() + ((y - 1) ** 2).mean(), [*means, y.mean(0)]
                x = jnp.tanh(y)
        return (x**2).mean() + sizes, (sizes, sum(means) / 12)

    (loss, (sizes, means)), grads = jax.value_and_grad(by_hand, has_aux=True)(layers)
    np.testing.assert_allclose(engine.train_batch(iter([(X, X)])), loss, 1e-5)
    [size] = [name for name in engine.metrics if name.endswith("/size")]
    np.testing.assert_allclose(engine.metrics[size], sizes, 1e-5)
    np.testing.assert_allclose(engine.metrics[size.replace("size", "mean")], means, 1e-4, 1e-6)
    np.testing.assert_allclose(engine.grad_norm, optax.tree.norm(grads), 1e-5)
    found = engine.evaluate([(X, X)])
    assert found.keys() == {"loss", size, size.replace("size", "mean")}


@pytest.mark.parametrize("kind", SPECS)
def test_dropped_with_one_warning(kind):
    spec, takes = SPECS[kind]
    with pytest.warns(
        UserWarning, match=r"layer 0 \(.*Outer\) sows 'inner/mean' .* 'inner/size' .*sown\(losses"
    ) as seen:
        engine = engine_of(spec)
        engine.train_batch(iter([(X, X)]))
        engine.evaluate([(X, X)])
        jaxpipe.reference.value_and_grad(engine.pipe.module, engine.to_layers(), (X[None], X[None]))
    assert len(seen) == 1 and engine.metrics.keys() == {"loss", "grad_norm"}
    with pytest.warns(UserWarning, match="sows 'inner/mean'") as seen:
        engine_of(spec.sown(losses=takes["losses"]))
    assert len(seen) == 1 and "inner/size" not in str(seen[0].message)


def test_specs_that_take_other_things_are_not_alike():
    spec, takes = SPECS["nnx"]
    taking = spec.sown(**takes)
    module = jaxpipe.PipelineModule([spec, taking, taking, LayerSpec(Outer).sown(**takes)])
    kinds = [layer.kind for layer in module.layers]
    assert kinds[0] is not kinds[1] and kinds[1] is kinds[2] is kinds[3]
    assert spec.takes == Takes() and repr(taking) == repr(spec)
    tied = jaxpipe.TiedLayerSpec("a", Outer).sown(**takes)
    assert tied.key == "a" and isinstance(tied, jaxpipe.TiedLayerSpec) and tied.takes


def test_several_values_pytrees_and_own_rules():
    sown = [
        SownValue("losses", "a", (1.0, 2.0)),
        SownValue("losses", "b", 3.0),
        SownValue("more", "b", (4.0,)),
        SownValue("seen", "m", ({"x": 1.0, "y": 4.0}, {"x": 2.0, "y": 6.0})),
        SownValue("else", "c", (1.0,)),
    ]
    takes = Takes.of(["losses", "more"], ["seen"])
    aux = takes.aux(sown, {"state": 1})
    assert (aux.state, aux.losses, aux.metrics) == ({"state": 1}, {"a": 3.0, "b": 7.0}, {"m/x": 1.5, "m/y": 5.0})
    assert takes.dropped(sown) == {"'c' ('else')"}


class Elsewhere(linen.Module):
    """Sows to a collection that is called as nobody else calls it, beside one with state."""

    @linen.compact
    def __call__(self, x, train: bool):
        self.sow("balance", "mean", x.mean())
        return linen.BatchNorm(not train)(x)


@pytest.mark.parametrize("built", [False, True])
def test_sown_to_a_collection_of_any_name(built):
    def spec():
        module = Elsewhere()
        return LayerSpec(module.bind(module.init(jax.random.key(0), X, train=False)) if built else Elsewhere)

    with pytest.warns(UserWarning, match=r"sows 'mean' \('balance'\), which nobody takes"):
        engine = engine_of(spec(), spec())
    assert [set(state) for state in engine.layer_state()] == [{"batch_stats"}] * 2
    engine = engine_of(*[spec().sown(losses="balance") for _ in range(2)])
    engine.train_batch(iter([(X, X)]))
    assert engine.metrics.keys() == {"loss", "grad_norm", "mean"}
    assert [set(state) for state in engine.layer_state()] == [{"batch_stats"}] * 2


class Twice(nnx.Module):
    def __init__(self, *, rngs):
        pass

    def __call__(self, x):
        self.sow(Loss, "a", x.mean())
        return jaxpipe.LayerOut(x, {"a": 1.0})


REFUSED = {
    "a number": (lambda: LayerSpec(Outer).sown(losses=1), r"sown\(losses=1\)"),
    "both": (lambda: LayerSpec(Outer).sown(Loss, (Loss,)), r"\['Loss'\] are among both"),
    "a name for nnx": (lambda: LayerSpec(Outer).sown("losses"), "names 'losses'. For flax.nnx it names types"),
    "params": (lambda: LayerSpec(Outer).sown(nnx.Param), "names nnx.Param"),
    "a type for linen": (lambda: LayerSpec(LinenOuter).sown(Loss), "names Loss. For flax.linen it names collections"),
    "a Layer": (lambda: LayerSpec(lambda: jaxpipe.Layer(dict, dict)).sown("a"), "is for flax modules"),
    "twice": (lambda: LayerSpec(Twice).sown(Loss), "sows 'a', and gives it in a jaxpipe.LayerOut"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, message):
    with pytest.raises(LayerError, match=message):
        jaxpipe.PipelineModule([make()]).shapes(X)


def test_nothing_is_told_where_nothing_is_sown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine_of(LayerSpec(nnx.Linear, 3, 3))
