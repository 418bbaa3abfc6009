"""Fingerprints: equal only where equations mean the same."""

import jax
import jax.extend.core
import numpy as np
import pytest

from jaxpipe.optimizer.fingerprint import fingerprint


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ((1, 2), [1, 2]),
        (np.float32(1), np.float64(1)),
        (np.arange(3), np.arange(3)[::-1]),
        ({"a": 1}, {"a": 2}),
    ],
)
def test_fingerprints_of_unlike_things(one, two):
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(one)


def test_fingerprints_of_jaxprs_look_at_structure_and_literals():
    def jaxpr(factor):
        return jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y * factor, x))(1.0)

    assert fingerprint(jaxpr(2.0)) == fingerprint(jaxpr(2.0))
    assert fingerprint(jaxpr(2.0)) != fingerprint(jaxpr(3.0))
    assert fingerprint(float("nan")) == fingerprint(float("nan"))
