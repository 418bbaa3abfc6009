"""Errors inside layers are the user's own, with the layer added; only what does not fit is told in other words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe.errors import LayerError

X = jnp.ones((4, 5))


class OddError(Exception):
    """Wants two arguments, and shows something else."""

    def __init__(self, code, *, detail):
        super().__init__(code)
        self.code, self.detail = code, detail

    def __str__(self):
        return f"odd {self.code}: {self.detail}"


def key_error(x):
    return {}["missing"]


def index_error(x):
    return [1, 2][x.shape[0]]


def by_hand(x):
    raise ValueError("my shapes do not please me: axis 3")


def type_error_by_hand(x):
    raise TypeError("dtype of my own")


def wrong_call(x):
    return by_hand(x, axis=3)


def wrong_number(x):
    return int("axis")


def odd(x):
    raise OddError(3, detail="x")


def tracer(x):
    return x if x.sum() > 0 else -x


def assertion(x):
    assert x.shape == (1,), "my shape"


def stop(x):
    return next(iter(()))


def lookup(x):
    return x.nothing


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (key_error, KeyError, "'missing'"),
        (index_error, IndexError, "list index out of range"),
        (by_hand, ValueError, "my shapes do not please me: axis 3"),
        (type_error_by_hand, TypeError, "dtype of my own"),
        (wrong_call, TypeError, "by_hand() got an unexpected keyword argument 'axis'"),
        (wrong_number, ValueError, "invalid literal for int() with base 10: 'axis'"),
        (odd, OddError, "odd 3: x"),
        (assertion, AssertionError, "my shape"),
        (stop, StopIteration, ""),
    ],
)
def test_the_users_own_errors(function, kind, message):
    module = jaxpipe.PipelineModule([jnp.tanh, jax.nn.relu, function])
    with pytest.raises(kind) as caught:
        module.shapes(X)
    assert type(caught.value) is kind and str(caught.value).startswith(message)
    assert (
        caught.value.__notes__[-1] == f"Raised in layer 2 ({function.__name__}), layer 1 (relu) returns float32[4,5]."
    )
    assert sum("Raised in" in note for note in caught.value.__notes__) == 1


@pytest.mark.parametrize(
    ("function", "kind"), [(tracer, jax.errors.TracerBoolConversionError), (lookup, AttributeError)]
)
def test_errors_of_jax_that_are_no_misfit(function, kind):
    with pytest.raises(kind) as caught:
        jaxpipe.PipelineModule([function]).shapes(X)
    notes = "\n".join(caught.value.__notes__)
    assert "Raised in layer 0" in notes and "the example inputs are float32[4,5]" in notes


DENSE = jaxpipe.Layer(lambda key, x: {"w": jnp.ones((3, 3))}, lambda p, x: x @ p["w"], "Dense")


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (DENSE, TypeError),
        (jaxpipe.LayerSpec(nnx.Linear, 3, 3), TypeError),
        (lambda x: x + jnp.ones((3, 3)), TypeError),
        (lambda x: x.reshape(7, 3), TypeError),
        (lambda x: jnp.concatenate([x, jnp.ones((4, 5, 1))]), TypeError),
        (lambda x: jnp.ones(3)[x], TypeError),
    ],
    ids=["dot", "nnx", "add", "reshape", "concatenate", "index"],
)
def test_what_does_not_fit_is_told_as_such(entry, kind):
    module = jaxpipe.PipelineModule([jnp.tanh, entry])
    message = (
        r"layer 1 \(.*\) cannot take its input: layer 0 \(tanh\) returns float32\[4,5\]. It failed with TypeError: ."
    )
    with pytest.raises(LayerError, match=message) as caught:
        module.shapes(X)
    assert isinstance(caught.value, kind) and isinstance(caught.value.__cause__, kind)


def test_params_of_another_input():
    """flax compares what it would make with what it is given."""
    module = jaxpipe.PipelineModule([jnp.tanh, jaxpipe.LayerSpec(linen.Dense, 3)])
    held = [{}, {"kernel": np.ones((7, 3), np.float32), "bias": np.ones((3,), np.float32)}]
    with pytest.raises(LayerError, match=r"layer 1 \(Dense\) cannot take its input: .*ScopeParamShapeError"):
        module.shapes(X, held)


def test_in_init_while_built_and_in_the_compiled_step():
    def init(key, x):
        raise IndexError("in init")

    with pytest.raises(IndexError, match="in init") as caught:
        jaxpipe.PipelineModule([jnp.tanh, jaxpipe.Layer(init, lambda p, x: x, "Mine")]).shapes(X)
    assert "Raised in layer 1 (Mine)" in caught.value.__notes__[-1]

    def factory(width):
        raise IndexError("in factory")

    with pytest.raises(IndexError, match="in factory") as caught:
        jaxpipe.PipelineModule([jnp.tanh, jaxpipe.LayerSpec(factory, 3)])
    assert "Raised in layer 1, factory(3), while it was built" in caught.value.__notes__[-1]

    calls = []

    def late(x):
        calls.append(x)
        if len(calls) > 1:  # init has run it by then
            raise IndexError("late")
        return x

    late_module = jaxpipe.PipelineModule([jnp.tanh, late], lambda y, t: y.mean())
    pipe = jaxpipe.Pipeline(late_module, jaxpipe.make_mesh(pipe=2), 1)
    params = pipe.init(0, X)
    with pytest.raises(IndexError, match="late") as caught:
        pipe.value_and_grad(params, (X[None], None))
    assert any("Raised in layer 1 (late)" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("remat", ["layer", "none"])
def test_in_a_backward_that_a_user_has_written(remat):
    def layer(bwd):
        @jax.custom_vjp
        def double(x):
            return 2 * x

        double.defvjp(lambda x: (2 * x, x), bwd)
        return double

    def raises(x, dy):
        raise IndexError("mine")

    def gradient(bwd):
        scale = jaxpipe.Layer(lambda key, x: {"w": jnp.ones(())}, lambda p, x: x * p["w"])  # without it, no backward
        module = jaxpipe.PipelineModule([scale, layer(bwd), jnp.tanh], lambda y, t: y.mean(), [0, 2, 3])
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 1, remat=remat)
        return pipe.value_and_grad(pipe.init(0, X), (X[None], None))

    with pytest.raises(IndexError, match="mine") as caught:
        gradient(raises)
    assert any("Raised in the backward of layer 1 (double)" in note for note in caught.value.__notes__)
    with pytest.raises((LayerError, TypeError), match="bfloat16"):
        gradient(lambda x, dy: (dy.astype(jnp.bfloat16),))
