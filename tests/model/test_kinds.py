"""Kinds: nothing gets out of one that is no JAX array, and errors say whose they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.model.blame import Fault, blame
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.kinds import BoundLayer, Kind

X, KEY = jnp.ones(3), jax.random.key(0)


def test_what_a_kind_returns_is_canonical():
    kind = Kind(
        lambda key, x: {"w": np.ones(2, np.float64)},
        lambda params, x, context, train: ((1.5, np.int64(3)), Aux({"n": np.int64(4)})),
    )
    params, ((y, n), aux) = kind.init(KEY, X), kind.apply({}, X, Context(None, {"n": jnp.int32(0)}), True)
    assert params["w"].dtype == y.dtype == jnp.float32 and n.dtype == aux.state["n"].dtype == jnp.int32
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in (params["w"], y, n))
    with pytest.raises(Fault, match="returned 'text' of type str"):
        Kind(lambda key, x: "text", kind.apply).init(KEY, X)


def test_errors_that_leave_a_kind_say_whose_they_are():
    """A mistake in shapes is told as a misfit of two layers only if JAX made it, which can be seen here and no later."""
    kind = Kind(lambda key, x: {}, lambda params, x, context, train: (x @ jnp.ones((4, 4)), Aux()))
    with pytest.raises(TypeError, match="layer 3 cannot take its input: layer 2 returns float32"):
        with blame("layer 3", lambda: "layer 2 returns float32[3]"):
            kind.apply({}, X, Context(), True)


def test_a_layer_asks_for_its_kind():
    kind = Kind(lambda key, x: {}, lambda params, x, context, train: (x, Aux()), uses_key=True)
    layer = BoundLayer("Mine", kind)
    assert (layer.init, layer.apply, layer.uses_key) == (kind.init, kind.apply, True)
