"""What both kinds of units are made of."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.executor.unit import repeated, split_inexact
from jaxpipe.model.shapes import is_inexact


def test_leaves_with_derivatives_go_back_where_they_were():
    tree = {"a": jnp.ones(2), "n": jnp.arange(2), "c": jnp.ones(1, jnp.complex64), "none": None, "k": jax.random.key(0)}
    leaves, rebuild = split_inexact(tree)
    assert [leaf.dtype for leaf in leaves] == [jnp.float32, jnp.complex64] and all(map(is_inexact, leaves))
    back = rebuild(["first", "second"])
    assert (back["a"], back["c"]) == ("first", "second") and back["n"] is tree["n"] and back["none"] is None
    with pytest.raises(ValueError, match="shorter"):
        rebuild(["first"])


def test_repetitions_in_order_and_a_single_one_without_a_scan():
    assert repeated(lambda c, i: (c, i), "carry", 1) == ("carry", 0)
    assert int(repeated(lambda c, i: c * 10 + i, jnp.int32(7), 4)) == 70123
