"""Gradients with None where nobody needs one."""

import jax.numpy as jnp

from jaxpipe.executor import flow

A, B, C = (jnp.full(2, n) for n in (1.0, 2.0, 3.0))


def test_without_flags_everything_is_needed():
    assert flow.needed([A, B], ()) == [A, B] and flow.spread([A, B], ()) == [A, B]
    assert flow.replaced([A, B], [B, C], ()) == [B, C]


def test_what_is_not_needed_is_none():
    flags = (True, False, True)
    assert flow.needed([A, B, C], flags) == [A, None, C]
    assert flow.spread([A, C], flags) == [A, None, C] and flow.leaves([A, None, C]) == [A, C]
    assert flow.replaced([A, B, C], [C, A], flags) == [C, B, A]


def test_fitted():
    found = flow.fitted([A, None, C], (False, True, True), [A, B, C])
    assert found[0] is None and (found[1] == 0).all() and found[2] is C
