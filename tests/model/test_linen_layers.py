"""linen modules as layers: the mode they are told, and their streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jaxpipe
from tests.model.flax_layers import Spec, X, dropped, factor, run


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
